"""What `make train` learns: three seeds, and the paper's ablations and other methods at the same budget.

    python bench/learning.py [--only NAME ...] [--output runs/learning]

Each row is one whole `rlef train` of a run file, evaluated in the same way on the same held-out problems;
only what the row says is different. "few-shot" trains nothing: the start model is shown two of its own
dialogs that it solved after feedback, on training problems. A run that is finished is read again and not
repeated, one that was cut off goes on. The last line is JSON: the figures of each run, and the ratios that
say whether it learned.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from rlef.evaluate import run_summary, write_summary

WITHOUT_VALUE = ("ppo.value_warmup_steps=0",)
GROUPS = ("rollout.rollouts_per_problem=8", *WITHOUT_VALUE)
RUNS = {
    "seed 1": ("run.seed=1",),
    "seed 2": ("run.seed=2",),
    "seed 3": ("run.seed=3",),
    "token-level value": ("run.seed=1", "ppo.value_level=token"),
    "token-level value seed 2": ("run.seed=2", "ppo.value_level=token"),
    "token-level value seed 3": ("run.seed=3", "ppo.value_level=token"),
    "no feedback in training": ("run.seed=1", "rollout.feedback=none"),
    "random feedback in training": ("run.seed=1", "rollout.feedback=random"),
    "single-turn training": ("run.seed=1", "rollout.turns=1"),
    "GRPO": ("run.seed=1", "ppo.method=grpo", *GROUPS),
    "RLOO": ("run.seed=1", "ppo.method=rloo", *GROUPS),
    "SFT on solved rollouts": ("run.seed=1", "ppo.method=sft", *WITHOUT_VALUE),
}
FEW_SHOT = "few-shot"
COLUMNS = ("1@1", "1@3", "single_turn_1@3", "random_feedback_1@3", "no_feedback_1@3")


def run(name: str, config: Path, output: Path) -> dict[str, Any]:
    """The summary of one training run, made now or before."""
    folder = name.replace(" ", "-")
    summary = output / folder / "summary.json"
    figures = json.loads(summary.read_text()) if summary.exists() else {"final": None}
    if figures["final"] is None:
        overrides = (*RUNS[name], f"run.name={folder}", f"run.output_dir={output}")
        rlef("train", config, "--resume", "auto", *overrides)
        figures = json.loads(summary.read_text())
    return figures


def few_shot(config: Path, output: Path) -> dict[str, Any]:
    """As `run`, of the start model without examples and with them."""
    folder = output / FEW_SHOT
    summary = folder / "summary.json"
    if not summary.exists():
        make_few_shot(config, folder)
    figures: dict[str, Any] = json.loads(summary.read_text())
    return figures


def make_few_shot(config: Path, folder: Path) -> None:
    examples = folder / "examples.jsonl"
    others = ("problems.eval=hidden_conventions:train", "problems.eval_size=64", "run.seed=1")
    budgets = "evaluation.budgets=[{n=1,k=3,temperature=1.0,top_p=1.0}]"
    dialogs = ("evaluation.turn_limits=3", "evaluation.feedback=true", budgets)
    evaluation = folder / "evaluation"
    rlef("eval", config, "--episodes", evaluation, *others, *dialogs)
    rlef("problems", "examples", config, evaluation, examples, *others)
    shown = (f"rollout.few_shot={examples}", "rollout.max_few_shot_tokens=400")
    phases: dict[str, Any] = {}
    for phase, settings in {"start": (), "final": shown}.items():
        rlef("eval", config, "--output", folder / f"{phase}.json", "run.seed=1", *settings)
        phases[phase] = json.loads((folder / f"{phase}.json").read_text())
    seconds = sum(each["seconds"] for each in phases.values())
    write_summary(folder / "summary.json", run_summary(**phases, seed=1, steps=0, seconds=seconds))


def rlef(*arguments: object) -> None:
    command = [sys.executable, "-m", "rlef", *map(str, arguments)]
    subprocess.run(command, check=True, stdout=sys.stderr)


def checks(figures: dict[str, Any]) -> dict[str, float]:
    """The three ratios that say whether the policy learned to use feedback."""
    start, final = figures["start"], figures["final"]
    return {
        "1@3 against the start model": final["1@3"] / start["1@3"],
        "1@3 against single responses": final["1@3"] / final["single_turn_1@3"],
        "1@3 with random feedback against true": final["random_feedback_1@3"] / final["1@3"],
    }


def table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown: a row per run, with the 95 % interval of 1@3."""
    first = next(iter(results.values()))
    rows = [("start model", first["start"]), *((name, figures["final"]) for name, figures in results.items())]
    lines = ["| run | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, figures in rows:
        cells = [f"{figures[column]:.3f}" for column in COLUMNS]
        low, high = figures["intervals"]["1@3"]
        cells[COLUMNS.index("1@3")] += f" [{low:.3f}, {high:.3f}]"
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", choices=[*RUNS, FEW_SHOT], default=[*RUNS, FEW_SHOT], metavar="NAME"
    )
    parser.add_argument("--config", type=Path, default=Path("configs/tiny.toml"))
    parser.add_argument("--output", type=Path, default=Path("runs/learning"))
    arguments = parser.parse_args()
    config, output = arguments.config, arguments.output
    results = {
        name: few_shot(config, output) if name == FEW_SHOT else run(name, config, output)
        for name in arguments.only
    }
    print(table(results))
    report = {
        name: {column: figures["final"][column] for column in COLUMNS}
        | {"seconds": figures["seconds"], "checks": checks(figures)}
        for name, figures in results.items()
    }
    print(json.dumps({"hardware": next(iter(results.values()))["hardware"], "runs": report}))


if __name__ == "__main__":
    main()
