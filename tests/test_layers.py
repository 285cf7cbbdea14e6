"""Who may import whom, read from the sources (ARCHITECTURE.md: layers, and one door per engine)."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Lowest first. A module imports from lower floors only, so modules of one floor do not know each other.
FLOORS: tuple[frozenset[str], ...] = (
    frozenset({"rlef_kernels", "rlef_sandbox"}),
    frozenset({"assertions", "config", "files", "pieces", "records"}),
    frozenset({"arithmetic", "few_shot", "job", "ports", "stopping", "validators"}),
    frozenset({"judging"}),
    frozenset(
        {
            "advantages",
            "byte_level_bpe",
            "charts",
            "chat_server",
            "chat_template",
            "execution",
            "families",
            "faults",
            "findings",
            "losses",
            "moments",
            "packing",
            "plan_cluster",
            "plan_model",
            "prompts",
            "rewards",
            "settings_file",
            "solve_rate",
        }
    ),
    frozenset(
        {
            "analysis",
            "attention",
            "checkpoint_files",
            "context",
            "dialects",
            "hidden_conventions",
            "launch",
            "megatron_cpu",
            "offload",
            "pretrained",
            "run_folder",
            "words",
        }
    ),
    frozenset(
        {
            "checkpoint",
            "plan_memory",
            "problems",
            "shards",
            "telemetry",
            "torch_model",
            "transcripts",
            "unrelated",
        }
    ),
    frozenset(
        {
            "contamination",
            "curriculum",
            "megatron_model",
            "megatron_training",
            "problem_check",
            "sources",
            "weights",
        }
    ),
    frozenset(
        {
            "bridge",
            "doctor_machine",
            "doctor_network",
            "doctor_sandbox",
            "doctor_storage",
            "learner",
            "megatron_policy",
            "plan_time",
            "report",
            "rollout",
            "measurement",
            "torch_policy",
            "torch_sampler",
            "vllm_sampler",
        }
    ),
    frozenset(
        {
            "doctor",
            "engine_group",
            "evaluate",
            "evaluation_folder",
            "gguf_import",
            "plan",
            "pretrain",
            "samplers",
            "served_rollouts",
            "streaming",
        }
    ),
    frozenset(
        {
            "asynchronous",
            "comparison",
            "evaluation_page",
            "few_shot_examples",
            "plan_report",
            "selection",
            "standalone",
        }
    ),
    frozenset({"own_rollouts"}),
    frozenset({"sampling", "sampling_process"}),
    frozenset({"commands", "train"}),
    frozenset({"problem_commands"}),
    frozenset({"cli"}),
    frozenset({"__main__"}),
)

# Every other file must do without these.
DOORS = {
    "megatron": {"megatron_policy", "megatron_training", "megatron_model", "megatron_cpu", "weights"},
    "vllm": {"vllm_sampler"},
    "flash_attn": {"attention"},
    "gguf": {"gguf_import"},
    "transformers": set(),
    "openai": {"chat_server"},
    "sacrebleu": {"analysis"},
    "triton": {path.stem for path in (ROOT / "kernels" / "rlef_kernels").glob("_*_triton.py")},
}

PACKAGES = {path.parent.name for path in (ROOT / "rlef").glob("*/__init__.py")}
TRAINER = sorted((ROOT / "rlef").rglob("*.py"))
KERNELS = sorted((ROOT / "kernels" / "rlef_kernels").rglob("*.py"))
SANDBOX = sorted((ROOT / "sandbox" / "rlef_sandbox").rglob("*.py"))


def imports(source: Path) -> Iterator[str]:
    """Full names of what a file imports, inside functions too; `from a import b` gives `a.b`."""
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source.name} imports relatively; write the whole name"
            yield from (f"{node.module}.{name.name}" for name in node.names)


def packages(source: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(source)}


def own_modules(source: Path) -> set[str]:
    """Which modules of the trainer, and which of its two libraries, a file imports."""
    modules = packages(source) & {"rlef_kernels", "rlef_sandbox"}
    inside = {name.split(".")[1] for name in imports(source) if name.startswith("rlef.")}
    return modules | {name for name in inside if any((ROOT / "rlef").glob(f"{name}.py")) or name in PACKAGES}


def floor_of(module: str) -> int:
    floors = [number for number, floor in enumerate(FLOORS) if module in floor]
    assert len(floors) == 1, f"{module} stands on {len(floors)} floors of FLOORS; give it exactly one"
    return floors[0]


def by_name(source: Path) -> str:
    return source.stem


@pytest.mark.parametrize("source", [path for path in TRAINER if path.name != "__init__.py"], ids=by_name)
def test_a_module_imports_from_lower_floors_only(source: Path) -> None:
    module = source.relative_to(ROOT / "rlef").parts[0].removesuffix(".py")
    higher = {name for name in own_modules(source) - {module} if floor_of(name) >= floor_of(module)}
    assert not higher, f"{module} imports {sorted(higher)} from its own floor or above"


@pytest.mark.parametrize("source", KERNELS, ids=by_name)
def test_the_kernels_need_only_torch_and_triton(source: Path) -> None:
    assert packages(source) <= sys.stdlib_module_names | {"torch", "triton", "rlef_kernels"}


@pytest.mark.parametrize("source", SANDBOX, ids=by_name)
def test_the_sandbox_needs_only_the_standard_library(source: Path) -> None:
    beside_the_worker = {"values"}  # its script runs outside the package
    assert packages(source) <= sys.stdlib_module_names | {"rlef_sandbox"} | beside_the_worker


@pytest.mark.parametrize("engine", DOORS)
def test_an_engine_has_one_door(engine: str) -> None:
    users = {source.stem for source in TRAINER + KERNELS + SANDBOX if engine in packages(source)}
    assert users <= DOORS[engine]


def test_only_the_bindings_know_pybind11() -> None:
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in {".cpp", ".hpp", ".h", ".c"}]
    assert sources
    assert {path.name for path in sources if "pybind11" in path.read_text(encoding="utf-8")} == {
        "bindings.cpp"
    }


@pytest.mark.parametrize("source", TRAINER + KERNELS + SANDBOX, ids=by_name)
def test_nothing_imports_tests_or_benchmarks(source: Path) -> None:
    assert not packages(source) & {"tests", "bench"}
