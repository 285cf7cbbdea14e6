"""What the documents say is so: settings, commands, messages, examples, names and links."""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import re
import shlex
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from torch.distributed.elastic.rendezvous import c10d_rendezvous_backend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import (
    DynamicRendezvousHandler,
    RendezvousTimeout,
)
from torch.distributed.launcher.api import LaunchConfig
from torch.distributed.run import parse_args

from rlef import hidden_conventions, prompts
from rlef.cli import main
from rlef.config import (
    Config,
    ConfigError,
    EvaluationConfig,
    ExecutorConfig,
    FeedbackKind,
    OptimizerConfig,
    PPOConfig,
    RewardConfig,
)
from rlef.evaluate import episode_metrics, evaluate, run_summary, summarise
from rlef.learner import Learner
from rlef.ports import Networks, SamplingParams
from rlef.problems import ProblemRow, read_jsonl, write_jsonl
from rlef.prompts import FailedTest
from rlef.records import Episode, ModelShape, Problem, StepStats
from rlef.settings_file import load_config
from rlef.telemetry import BETWEEN_STEPS, METRICS_FILE, Telemetry, read_metrics
from rlef.torch_model import LlamaModel
from rlef.torch_policy import TorchNetwork
from rlef_sandbox import Executor, Layer, Test
from tests.megatron_examples import ALONE
from tests.ppo_examples import VOCAB, episode

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("[a-z]*/README.md")])


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a document in one language."""
    found = re.findall(r"^(`{3,})(\w*)\n(.*?)^\1$", text, flags=re.DOTALL | re.MULTILINE)
    return [body for _, of, body in found if of == language]


def section_of(text: str, heading: str) -> str:
    """What stands under a heading of the second level."""
    return text.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]


def rows(text: str) -> list[list[str]]:
    """The cells of all tables, without their headings."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    is_rule = [all(re.fullmatch(r"-+", cell) for cell in row) for row in cells]
    return [
        row
        for place, row in enumerate(cells)
        if not is_rule[place] and not (place + 1 < len(cells) and is_rule[place + 1])
    ]


def named(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def allowed_values(schema: dict[str, Any]) -> str:
    """How docs/settings.md writes what pydantic's schema allows."""
    if "enum" in schema:
        return ", ".join(f'`"{value}"`' for value in schema["enum"])
    if schema["type"] == "boolean":
        return "`true`, `false`"
    if schema["type"] == "string":
        return "name" if "pattern" in schema else "text"
    if schema["type"] == "array":
        of_names = "enum" in schema["items"] or schema["items"].get("type") == "string"
        of = "tables" if "$ref" in schema["items"] else "names" if of_names else "integers"
        return f"list of {of}"
    signs = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
    bounds = ", ".join(f"{sign} {schema[key]:g}" for key, sign in signs.items() if key in schema)
    return f"{schema['type']} {bounds}".strip()


@pytest.mark.parametrize("section", Config.model_fields)
def test_every_setting_is_listed_with_its_values_and_its_default(section: str) -> None:
    table = getattr(Config(), section)
    schema = type(table).model_json_schema()["properties"]
    listed = [row[:3] for row in rows(section_of(text_of("docs/settings.md"), section))]
    assert listed == [
        [f"`{key}`", allowed_values(schema[key]), f"`{json.dumps(default)}`"]
        for key, default in table.model_dump(mode="json").items()
    ]


def test_every_setting_says_where_its_default_comes_from_and_what_it_is() -> None:
    for *_, whence, reason in rows(text_of("docs/settings.md")):
        assert whence in {"paper", "open", "ours"}
        assert reason


def test_every_layer_that_may_be_missing_is_named() -> None:
    (row,) = [row for row in rows(text_of("docs/settings.md")) if row[0] == "`allow_missing`"]
    assert named(row[-1]) == [layer.value for layer in Layer]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_setting_that_is_named_exists(document: Path) -> None:
    known = [f"{section}.{key}" for section, table in Config() for key in type(table).model_fields]
    sections = "|".join(Config.model_fields)
    text = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)
    for name in re.findall(rf"`((?:{sections})\.[a-z_]+\*?)(?: = [^`]*)?`", text):
        if name.split(".")[1] in {"py", "safetensors", "json", "html"}:  # a file
            continue
        assert any(re.fullmatch(name.replace("*", ".*"), setting) for setting in known), name


SHELL_LINES = [
    (document.name, line)
    for document in DOCUMENTS
    for block in blocks(document.read_text(encoding="utf-8"), "sh")
    for line in block.splitlines()
    if line.strip()
]


@pytest.mark.parametrize(("document", "line"), SHELL_LINES)
def test_a_command_that_is_shown_can_be_given(
    document: str, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    words = shlex.split(line, comments=True)
    if words[0] == "make":
        assert_makefile_knows(words[1:])
    elif "rlef" in words:
        start = words.index("rlef") + 1
        assert_rlef_understands(words[start:], processes=processes_of(words))
    elif words[0] == "sbatch":
        (script,) = [place for place, word in enumerate(words) if word.endswith(".sbatch")]
        assert (ROOT / words[script]).exists()
        assert_rlef_understands(["train", *words[script + 1 :]], processes=None)
    else:
        paths = [word for word in words if "/" in word and not word.startswith(".venv")]
        assert all((ROOT / path).exists() for path in paths), paths


def processes_of(words: Sequence[str]) -> str | None:
    """How many a torchrun starts, on all its nodes."""
    if words[0] != "torchrun":
        return None
    options = parse_args(words[1:])
    return str(int(options.nnodes.split(":")[-1]) * int(options.nproc_per_node))


def assert_makefile_knows(words: Sequence[str]) -> None:
    makefile = text_of("Makefile")
    for word in words:
        name, is_variable, _ = word.partition("=")
        pattern = rf"^{name} \?=" if is_variable else rf"^{name}:"
        assert re.search(pattern, makefile, flags=re.MULTILINE), word


def assert_rlef_understands(words: Sequence[str], *, processes: str | None) -> None:
    """With `processes`, as under a torchrun that starts so many."""
    assert isinstance(main, click.Group)
    command = main.commands[words[0]]
    parameters = command.make_context(words[0], list(words[1:])).params
    if "config_file" in parameters:
        of_torchrun = [f"parallel.processes={processes}"] if processes else []
        load_config(parameters["config_file"], [*parameters["overrides"], *of_torchrun])


def test_every_command_is_shown_in_the_readme() -> None:
    assert isinstance(main, click.Group)
    shown = {line.split()[1] for _, line in SHELL_LINES if line.startswith("rlef ")}
    assert shown >= set(main.commands)


def test_the_run_file_of_the_readme_is_valid() -> None:
    (run_file,) = blocks(text_of("README.md"), "toml")
    Config.model_validate(tomllib.loads(run_file))


CONSOLE = re.findall(
    r"^\$ rlef (.*)\n(.*)$", "".join(blocks(text_of("README.md"), "console")), flags=re.MULTILINE
)


@pytest.mark.parametrize(("command", "message"), CONSOLE)
def test_an_error_that_is_shown_is_the_commands_own(
    command: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    result = CliRunner().invoke(main, [*shlex.split(command), "--dry-run"])
    assert (result.stderr, result.exit_code) == (message + "\n", 2)


def test_the_executors_example_prints_what_its_comment_says() -> None:
    (example,) = blocks(text_of("README.md"), "python")
    (comment,) = re.findall(r"print\(.*\)  # (.*)", example)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(example, {})
    assert printed.getvalue().split() == comment.split(", ")


def test_the_dialog_of_the_readme_is_what_execution_says() -> None:
    (dialog,) = blocks(text_of("README.md"), "text")
    pieces = re.split(r"^\[(?:user|assistant)\]\n", dialog, flags=re.MULTILINE)[1:]
    statement, first, feedback, second = (piece.removesuffix("\n") for piece in pieces)
    assert statement == prompts.prompt_text(statement.split("\n")[0])
    test = Test("7 0 2 0 0 2\n", "7,0\n")
    programs = [prompts.extract_code(response) or "" for response in (first, second)]
    with Executor(workers=1) as executor:
        (failed,), (passed,) = (executor.run(program, [test]) for program in programs)
    assert feedback == prompts.feedback_text([FailedTest(test=test, result=failed)], max_test_characters=512)
    assert passed.verdict == "passed"


def test_the_marker_file_of_the_readme_is_that_of_the_shipped_model() -> None:
    (markers,) = blocks(text_of("README.md"), "json")
    assert json.loads(markers) == json.loads(text_of("rlef/data/model/dialog.json"))


def test_the_example_problems_are_read_and_written_as_they_stand(tmp_path: Path) -> None:
    (example,) = blocks(text_of("docs/problems.md"), "json")
    path, again = tmp_path / "problems.jsonl", tmp_path / "again.jsonl"
    path.write_text(example, encoding="utf-8")
    bare, full = read_jsonl(path, defaults=ExecutorConfig())
    assert (bare.id, bare.time_limit_s, bare.solutions) == ("add", 10.0, ())
    write_jsonl(again, iter([full]))
    assert json.loads(again.read_text(encoding="utf-8")) == json.loads(example.splitlines()[1])


def test_the_example_of_a_bad_line_is_the_readers_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (message,) = blocks(text_of("docs/problems.md"), "text")
    (example,) = blocks(text_of("docs/problems.md"), "json")
    bad = example.splitlines()
    bad[1] = bad[1].replace('"input"', '"inputs"')
    Path("train.jsonl").write_text("\n".join(bad), encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        list(read_jsonl(Path("train.jsonl"), defaults=ExecutorConfig()))
    assert f"rlef: error: {caught.value}\n" == message


def test_every_field_of_a_problem_is_documented() -> None:
    fields, *_ = section_of(text_of("docs/problems.md"), "Files").split("All tests of a problem")
    assert [named(row[0]) for row in rows(fields)] == [[name] for name in ProblemRow.model_fields]


def test_the_numbers_of_the_embedded_source_are_its_constants() -> None:
    for name in ("ARCHITECTURE.md", "docs/problems.md"):
        assert f"at least {hidden_conventions.MINIMUM_READINGS} consistent readings" in text_of(name)
    assert hidden_conventions.PRIVATE_TESTS == 5
    assert "one public test and five private ones" in text_of("docs/problems.md")


def test_every_module_is_in_the_architecture() -> None:
    modules = {path.name for path in (ROOT / "rlef").glob("*.py") if not path.name.startswith("__")}
    layers = section_of(text_of("ARCHITECTURE.md"), "Layers")
    assert {name for name in named(layers) if name.endswith(".py")} == modules


def test_every_file_that_the_architecture_names_exists() -> None:
    for name in re.findall(r"[\w/]+\.(?:py|toml|txt|md)\b", text_of("ARCHITECTURE.md")):
        assert (ROOT / name).exists() or (ROOT / "rlef" / name).exists(), name


def test_what_the_architecture_finds_in_a_file_is_there() -> None:
    pairs = re.findall(r"`([\w.]+)(?:\(\))?`(?: in|, in| of) `([\w/]+\.py)`", text_of("ARCHITECTURE.md"))
    assert pairs
    for name, file in pairs:
        path = ROOT / file if (ROOT / file).exists() else ROOT / "rlef" / file
        assert re.search(rf"\b{name.split('.')[-1]}\b", path.read_text(encoding="utf-8")), (name, file)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_link_leads_somewhere(document: Path) -> None:
    text = re.sub(r"(`{3,}).*?\1", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        path = document.parent / name if name else document
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target


def anchors(document: Path) -> set[str]:
    """The fragments of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_metric_is_documented(tmp_path: Path) -> None:
    documented = {
        name
        for row in rows(section_of(text_of("docs/outputs.md"), "metrics.jsonl"))
        for name in named(row[0])
    }
    episodes = [episode("..##.#", seed=1), episode(".#", seed=2, solved=True)]
    metrics = episode_metrics(episodes, RewardConfig()) | learned(episodes)
    by_run = ("tests_run", "seconds/sampling", "seconds/executing", "staleness", "staleness_max")
    by_run += ("problems/active", "problems/skipped_solved", "problems/skipped_unsolved")
    by_run += ("slowest_rank", "slowest_rank_ratio")
    by_run += ("executor/longest_s", "executor/alone_s", "executor/restarts", "executor/retries")
    by_run += ("executor/cache_hits", "executor/cache_saved_s")
    metrics |= dict.fromkeys(by_run, 1.0)  # train.Run.metrics
    with Telemetry(tmp_path, name="run", total_steps=1) as telemetry:
        for phase in (*BETWEEN_STEPS, "waiting", "learning"):  # the last two by train.Run
            with telemetry.timer.phase(phase):
                pass
        telemetry.step(StepStats(step=1, metrics=metrics))
    (written,) = read_metrics(tmp_path / METRICS_FILE)
    assert {"step", *written.metrics} == documented


def learned(episodes: Sequence[Episode]) -> dict[str, float]:
    """The metrics of one learning step of the plain torch networks."""
    shape = ModelShape(
        vocab_size=VOCAB,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=16,
        rope_theta=10000.0,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
    )
    networks = Networks(
        policy=TorchNetwork(LlamaModel(shape), optimizer=OptimizerConfig()),
        reference=TorchNetwork(LlamaModel(shape)),
        value=TorchNetwork(LlamaModel(shape, head="value"), optimizer=OptimizerConfig()),
        parallel=ALONE,
    )
    return Learner(networks, ppo=PPOConfig(updates_per_step=1), rewards=RewardConfig()).step(episodes)


def test_every_figure_of_the_summary_is_documented() -> None:
    section = section_of(text_of("docs/outputs.md"), "summary.json")
    documented = {name for row in rows(section) for name in named(row[0])}
    (problem,) = hidden_conventions.generate("heldout", seed=0, size=1)

    def rollouts(
        problems: Sequence[Problem],
        *,
        numbers: Sequence[int],
        params: SamplingParams,
        turns: int,
        feedback: FeedbackKind,
    ) -> list[Episode]:
        return [episode("..#") for _ in problems]

    evaluation = evaluate(
        [problem],
        rollouts=rollouts,
        config=Config(evaluation=EvaluationConfig(rollouts_per_problem=1, bootstrap_samples=1)),
    )
    figures = summarise(evaluation)
    assert set(figures) == documented
    for name in run_summary(start=figures, final=None, seed=1, steps=1, seconds=1.0):
        assert f"`{name}`" in section


def test_the_limits_of_torchrun_are_its_own() -> None:
    listed = {name: row[1] for row in rows(text_of("docs/launch.md")) for name in named(row[0])}
    alive = inspect.signature(DynamicRendezvousHandler.from_backend).parameters
    interval, attempts = alive["keep_alive_interval"].default, alive["keep_alive_max_attempt"].default
    assert listed["join_timeout"] == f"{RendezvousTimeout().join.seconds} s"
    assert listed["keep_alive_interval"] == f"{interval} s, {attempts}"
    shutdown = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=1).shutdown_timeout
    assert listed["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == f"{shutdown} s"
    assert f'get_as_int("read_timeout", {listed["read_timeout"].removesuffix(" s")})' in inspect.getsource(
        c10d_rendezvous_backend
    )
    assert listed["--max-restarts"] == str(parse_args(["-m", "rlef"]).max_restarts)
    for name in ("parallel.timeout_s", "rollout.timeout_s"):
        section, key = name.split(".")
        assert listed[name] == f"{getattr(getattr(Config(), section), key)} s"


def test_the_batch_script_launches_as_the_document_does() -> None:
    script = text_of("configs/slurm/train.sbatch")
    assert dict(re.findall(r"^(\w+)=(\d+)", script, flags=re.MULTILINE)) == {
        "launches": "3",
        "restarts": "3",
        "save_s": "540",
        "longest_cut_s": "600",
        "missing_node_s": "900",
    }
    command = next(line for name, line in SHELL_LINES if name == "launch.md" and "--nnodes" in line)
    assert "read_timeout=600,join_timeout=900" in command
    assert "--signal=B:TERM@600" in script
    assert "--max-restarts 3" in command
