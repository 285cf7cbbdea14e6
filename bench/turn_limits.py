"""What more turns bring with each kind of feedback, before and after training.

    python -m bench.turn_limits [--output runs/learning] [--problems 256] [--rollouts 4]

Trains `seed 1` of bench/learning.py into the same folder as that script, exports the policy, and measures by
`rlef eval --episodes` the model that it started from and the policy: turn limits 1, 3, 5 and 10, true, no and
random feedback. What is there already is not made again; when what dialogs are told has changed, delete
`turn-limits` in that folder first.

Ten turns at the length limits of configs/tiny.toml do not fit the model's context of 1,024 tokens. Dialogs
are far shorter than these limits, so that lower ones serve here, and what they may have cut is counted and
printed. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from bench.learning import run
from rlef.evaluation_folder import FIGURES_FILE, read_ended, read_json
from rlef.transcripts import Transcript, TranscriptTurn

SEED = "seed 1"
TURN_LIMITS = (1, 3, 5, 10)
LENGTHS = {"max_prompt_tokens": 32, "max_response_tokens": 40, "max_feedback_tokens": 64}
SHOWN_TURNS = (1, 2, 3, 5, 10)

Cell = dict[str, Any]


def rlef(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "rlef", *arguments], check=True, stdout=sys.stderr)


def export(training: Path, model: Path) -> None:
    """The policy of a run as a model folder; made again each time, since an earlier one may be half a one."""
    shutil.rmtree(model, ignore_errors=True)
    rlef("export", str(training), str(model))


def evaluated(config: Path, folder: Path, model: str, *, problems: int, rollouts: int) -> list[Cell]:
    """The cells of one model's matrix."""
    rlef(
        "eval",
        str(config),
        "--episodes",
        str(folder),
        f"model.path={model}",
        f"problems.eval_size={problems}",
        *(f"rollout.{name}={tokens}" for name, tokens in LENGTHS.items()),
        f"evaluation.rollouts_per_problem={rollouts}",
        f"evaluation.turn_limits={','.join(map(str, TURN_LIMITS))}",
        "evaluation.budgets=[{n=1,k=3,temperature=1.0,top_p=1.0}]",
    )
    cells: list[Cell] = read_json(folder / FIGURES_FILE)["cells"]
    return cells


def lengths(folder: Path) -> dict[str, Any]:
    """Shares of what reached its limit, and so may have been cut, and the longest of each kind, in tokens.

    Responses by turn as well: a limit that is too low cuts from the first turn on, a model that rambles in
    long dialogs is cut late.
    """
    dialogs = [dialog for drawn in read_ended(folder).drawn.values() for dialog in drawn]
    turns = [turn for dialog in dialogs for turn in dialog.turns]
    told = [tokens for dialog in dialogs for tokens in feedback_tokens(dialog)]
    prompts = [dialog.turns[0].prompt_tokens or 0 for dialog in dialogs]
    return {
        "longest prompt": max(prompts),
        "longest response that solved": max(
            (dialog.turns[-1].response_tokens or 0 for dialog in dialogs if dialog.solved), default=None
        ),
        "prompts at the limit": share([tokens == LENGTHS["max_prompt_tokens"] for tokens in prompts]),
        "responses cut": cut_responses(turns),
        "responses cut by turn": {
            place: cut_responses(
                [dialog.turns[place - 1] for dialog in dialogs if len(dialog.turns) >= place]
            )
            for place in SHOWN_TURNS
        },
        "feedback at the limit": share([tokens == LENGTHS["max_feedback_tokens"] for tokens in told]),
        "longest dialog": max((turn.prompt_tokens or 0) + (turn.response_tokens or 0) for turn in turns),
    }


def cut_responses(turns: Sequence[TranscriptTurn]) -> float | None:
    return share([turn.finish_reason == "length" for turn in turns]) if turns else None


def feedback_tokens(dialog: Transcript) -> list[int]:
    """Of each message between two responses; a response that was cut is closed by one token more."""
    return [
        (later.prompt_tokens or 0)
        - (earlier.prompt_tokens or 0)
        - (earlier.response_tokens or 0)
        - (earlier.finish_reason == "length")
        for earlier, later in pairwise(dialog.turns)
    ]


def share(found: Sequence[bool]) -> float:
    return sum(found) / len(found)


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def by_turn_limit(models: dict[str, list[Cell]], text_of: Callable[[Cell], str]) -> str:
    """A row per model and kind of feedback, a column per turn limit."""
    rows: dict[tuple[str, str], list[str]] = {}
    for model, cells in models.items():
        for cell in cells:
            rows.setdefault((model, cell["feedback"]), []).append(text_of(cell))
    headings = ["model", "feedback", *map(str, TURN_LIMITS)]
    return markdown(headings, [[*names, *texts] for names, texts in rows.items()])


def solved_by_one_dialog(cell: Cell) -> str:
    return interval(cell["solve_rates"][f"1@{cell['turn_limit']}"])


def solved_by_three_responses(cell: Cell) -> str:
    """Three single responses, or one dialog of up to three."""
    return interval(cell["solve_rates"].get("1@3"))


def cost_of_a_solve(cell: Cell) -> str:
    return f"{number(cell['response_tokens_per_solve'], ',.0f')} / {number(cell['seconds_per_solve'], '.2f')}"


def behaviour(cell: Cell) -> list[str]:
    return [
        percent(cell["repair_rate"]),
        percent(cell["identical_resubmission_rate"]),
        number(cell["edit_size"], ".3f"),
        number(cell["mean_turns"], ".2f"),
    ]


def outcomes(cell: Cell) -> str:
    """What the public tests said of the responses of some turns, in shares of those."""
    counts = cell["outcomes"]
    occurring = [name for name in counts[0] if any(turn[name] for turn in counts)]
    shown = [turn for turn in SHOWN_TURNS if turn <= len(counts)]
    rows = [
        [name, *(percent(counts[turn - 1][name] / sum(counts[turn - 1].values())) for turn in shown)]
        for name in occurring
    ]
    responses = ["responses", *(f"{sum(counts[turn - 1].values()):,}" for turn in shown)]
    return markdown(["outcome", *(f"turn {turn}" for turn in shown)], [*rows, responses])


def transitions(cell: Cell) -> str:
    """Which outcome followed which, in shares of the row."""
    table: dict[str, dict[str, int]] = cell["transitions"]
    totals = sum((Counter(row) for row in table.values()), Counter())
    columns = [name for name in cell["outcomes"][0] if totals[name]]
    rows = [
        [
            name,
            *(percent(row.get(column, 0) / sum(row.values())) for column in columns),
            f"{sum(row.values()):,}",
        ]
        for name, row in table.items()
    ]
    return markdown(["after", *columns, "pairs"], rows)


def interval(estimate: dict[str, float] | None) -> str:
    if estimate is None:
        return "–"
    return f"{estimate['value']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}]"


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def show(models: dict[str, list[Cell]], cut: dict[str, dict[str, Any]]) -> None:
    for title, text_of in {
        "Solved by one dialog, by its turn limit (95 % intervals)": solved_by_one_dialog,
        "Solved by three responses: 1@3": solved_by_three_responses,
        "Tokens of responses / seconds for a solve": cost_of_a_solve,
    }.items():
        print(f"{title}\n\n{by_turn_limit(models, text_of)}\n")
    longest = {
        (model, cell["feedback"]): cell
        for model, cells in models.items()
        for cell in cells
        if cell["turn_limit"] == max(TURN_LIMITS)
    }
    headings = ["model", "feedback", "repaired", "same again", "edit size", "turns"]
    rows = [[*names, *behaviour(cell)] for names, cell in longest.items()]
    print(f"Behaviour in up to {max(TURN_LIMITS)} turns\n\n{markdown(headings, rows)}\n")
    for model in models:
        cell = longest[model, "true"]
        print(f"Outcomes by turn, {model}, true feedback\n\n{outcomes(cell)}\n")
        print(f"What followed which outcome, {model}, true feedback\n\n{transitions(cell)}\n")
    for model, found in cut.items():
        print(f"Lengths, {model}: {found}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/tiny.toml"))
    parser.add_argument("--output", type=Path, default=Path("runs/learning"))
    parser.add_argument("--problems", type=int, default=256)
    parser.add_argument(
        "--rollouts", type=int, default=4, help="Dialogs of each problem and kind of feedback."
    )
    arguments = parser.parse_args()
    figures = run(SEED, arguments.config, arguments.output)
    folder = arguments.output / "turn-limits"
    export(arguments.output / SEED.replace(" ", "-"), folder / "policy")
    models = {"start": "embedded", "trained": str(folder / "policy")}
    cells = {
        name: evaluated(
            arguments.config,
            folder / name,
            model,
            problems=arguments.problems,
            rollouts=arguments.rollouts,
        )
        for name, model in models.items()
    }
    cut = {name: lengths(folder / name) for name in models}
    show(cells, cut)
    print(json.dumps({"hardware": figures["hardware"], "lengths": cut, "cells": cells}))


if __name__ == "__main__":
    main()
