"""What `make train` learns: three seeds, and the paper's ablations at the same budget.

    python bench/learning.py [--only NAME ...] [--output runs/learning]

Each row is one whole `rlef train` of a run file, evaluated in the same way on the same held-out problems;
only what the row says is different. A run that is finished is read again and not repeated, one that was cut
off goes on. The last line is JSON: the figures of each run, and the ratios that say whether it learned.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

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
    "single-turn training": ("run.seed=1", "rollout.turns=1"),
    "GRPO": ("run.seed=1", "ppo.method=grpo", *GROUPS),
    "RLOO": ("run.seed=1", "ppo.method=rloo", *GROUPS),
    "SFT on solved rollouts": ("run.seed=1", "ppo.method=sft", *WITHOUT_VALUE),
}
COLUMNS = ("1@1", "1@3", "single_turn_1@3", "random_feedback_1@3", "no_feedback_1@3")


def run(name: str, config: Path, output: Path) -> dict[str, Any]:
    """The summary of one training run, made now or before."""
    folder = name.replace(" ", "-")
    summary = output / folder / "summary.json"
    figures = json.loads(summary.read_text()) if summary.exists() else {"final": None}
    if figures["final"] is None:
        overrides = (*RUNS[name], f"run.name={folder}", f"run.output_dir={output}")
        command = [sys.executable, "-m", "rlef", "train", str(config), "--resume", "auto", *overrides]
        subprocess.run(command, check=True, stdout=sys.stderr)
        figures = json.loads(summary.read_text())
    return figures


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
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS), metavar="NAME")
    parser.add_argument("--config", type=Path, default=Path("configs/tiny.toml"))
    parser.add_argument("--output", type=Path, default=Path("runs/learning"))
    arguments = parser.parse_args()
    results = {name: run(name, arguments.config, arguments.output) for name in arguments.only}
    print(table(results))
    report = {
        name: {column: figures["final"][column] for column in COLUMNS}
        | {"seconds": figures["seconds"], "checks": checks(figures)}
        for name, figures in results.items()
    }
    print(json.dumps({"hardware": next(iter(results.values()))["hardware"], "runs": report}))


if __name__ == "__main__":
    main()
