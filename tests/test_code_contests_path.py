"""The whole way of CodeContests files, by the commands that docs/problems.md shows, on two cores.

Their problems are the embedded ones, so that the embedded model can attempt them, and so that every dialog
has a twin: the same evaluation of the embedded source.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from rlef import hidden_conventions
from rlef.cli import main
from rlef.config import ExecutorConfig
from rlef.problems import read_jsonl
from rlef.records import Problem, text_input
from rlef.transcripts import read_transcripts
from tests.small_runs import ROOT, read_lines
from tests.sources import examples

pytestmark = pytest.mark.slow

TRAIN_SIZE, TEST_SIZE, STEPS, EPISODES = 32, 16, 2, 32
PRIVATE_TESTS = 3  # of a row; the others are its generated tests
KINDS = ("true", "none", "random")
ORIGINALS = {
    "train": list(hidden_conventions.generate("train", seed=0, size=TRAIN_SIZE)),
    "test": list(hidden_conventions.generate("heldout", seed=0, size=TEST_SIZE)),
}


def published_tests(tests: list[Any]) -> dict[str, list[str]]:
    return {
        "input": [text_input(test) for test in tests],
        "output": [test.expected_output for test in tests],
    }


def row_of(problem: Problem) -> examples.Row:
    """A row as published: Python 3 beside other languages."""
    (solution,), (wrong,) = problem.solutions, problem.incorrect_solutions
    public, private = list(problem.public_tests), list(problem.private_tests)
    return {
        "name": problem.id,
        "description": problem.statement,
        "public_tests": published_tests(public),
        "private_tests": published_tests(private[:PRIVATE_TESTS]),
        "generated_tests": published_tests(private[PRIVATE_TESTS:]),
        "solutions": {
            "language": [examples.CPP, examples.PYTHON3, examples.PYTHON2],
            "solution": ["int main() {}", solution, "print raw_input()"],
        },
        "incorrect_solutions": {
            "language": [examples.PYTHON3, examples.CPP],
            "solution": [wrong, "int main() { return 1; }"],
        },
        "time_limit": {"seconds": int(problem.time_limit_s), "nanos": 0},
        "memory_limit_bytes": problem.memory_limit_bytes,
    }


@dataclass(frozen=True)
class Walked:
    """What the commands left."""

    folder: Path

    def json(self, name: str) -> Any:
        return json.loads((self.folder / name).read_text())

    def dialogs(self, evaluation: str, kind: str) -> list[Any]:
        """All of each but its tokens and seconds."""
        found = read_transcripts(
            self.folder / evaluation / "transcripts" / f"{kind}-temperature-1-top-p-1.jsonl"
        )
        return [
            (
                dialog.problem_id,
                dialog.number,
                [(turn.response, turn.code, turn.outcome) for turn in dialog.turns],
                dialog.solved,
            )
            for dialog in found
        ]

    def solved_by_one_dialog(self, evaluation: str, kind: str) -> float:
        (value,) = (
            cell["solve_rates"]["1@3"]["value"]
            for cell in self.json(f"{evaluation}/evaluation.json")["cells"]
            if (cell["feedback"], cell["turn_limit"]) == (kind, 3)
        )
        return float(value)


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> Walked:
    folder = tmp_path_factory.mktemp("code-contests")

    def rlef(*arguments: str) -> None:
        result = CliRunner().invoke(main, list(arguments))
        assert result.exit_code == 0, (arguments, result.output, result.exception)

    rows = {split: [row_of(problem) for problem in originals] for split, originals in ORIGINALS.items()}
    rows["train"].insert(
        5, rows["train"][0] | {"name": "untested", "private_tests": {"input": [], "output": []}}
    )
    for split, of_split in rows.items():
        published, made = folder / f"{split}-00000-of-00001.parquet", folder / f"{split}.jsonl"
        examples.code_contests(published, *of_split)
        options = ["--generated-tests", "--report", str(folder / f"{split}-report.json")]
        if split == "test":
            options += ["--against", str(folder / "train.jsonl")]
        rlef("problems", "convert", "codecontests", str(published), str(made), *options)
        rlef("problems", "check", str(made), "--output", str(folder / f"{split}-check.json"))
    settings = (
        str(ROOT / "configs" / "tiny.toml"),
        f"problems.train={folder / 'train.jsonl'}",
        f"problems.eval={folder / 'test.jsonl'}",
        f"problems.eval_size={TEST_SIZE}",  # of the embedded source
    )
    rlef(
        *("train", *settings, f"run.output_dir={folder}", "run.name=run", f"run.steps={STEPS}"),
        *("parallel.processes=2", f"rollout.episodes_per_step={EPISODES}", "ppo.value_warmup_steps=0"),
    )
    rlef("export", str(folder / "run"), str(folder / "policy"))
    for name, more in {
        "start": ("model.path=embedded",),
        "policy": (f"model.path={folder / 'policy'}",),
        "twin": ("model.path=embedded", "problems.eval=hidden_conventions:heldout"),
    }.items():
        rlef(
            *("eval", *settings, *more, "--episodes", str(folder / f"eval-{name}")),
            *("evaluation.turn_limits=1,3", "evaluation.budgets=[{n=1,k=1,temperature=1.0,top_p=1.0}]"),
        )
    evaluations = str(folder / "eval-start"), str(folder / "eval-policy")
    rlef("compare", *evaluations, "--output", str(folder / "differences.json"))
    return Walked(folder)


def test_the_files_become_the_problems_that_they_were_made_from(walked: Walked) -> None:
    for split, originals in ORIGINALS.items():
        found = list(read_jsonl(walked.folder / f"{split}.jsonl", defaults=ExecutorConfig()))
        unset = [
            replace(problem, source="hidden_conventions", difficulty="", rating=None) for problem in found
        ]
        assert unset == originals


def test_a_row_without_private_tests_is_set_aside_and_named(walked: Walked) -> None:
    made = walked.json("train-report.json")
    assert made["written"] == TRAIN_SIZE
    assert [(each["id"], each["reason"]) for each in made["set_aside"]] == [("untested", "no private tests")]


def test_their_solutions_pass_and_their_wrong_programs_fail(walked: Walked) -> None:
    for split, size in (("train", TRAIN_SIZE), ("test", TEST_SIZE)):
        found = walked.json(f"{split}-check.json")
        assert (found["problems"], found["sound"], found["amiss"]) == (size, size, [])
        assert (found["solutions"], found["incorrect_solutions"]) == (size, size)


def test_training_takes_its_steps_on_them_and_changes_the_policy(walked: Walked) -> None:
    steps = read_lines(walked.folder / "run" / "metrics.jsonl")
    assert [step["step"] for step in steps] == [1, 2]
    assert all(0 < step["solve_rate"] < 1 for step in steps)  # some of both: there is something to learn from
    figures = walked.json("run/summary.json")
    assert [figures[phase]["problems"] for phase in ("start", "final")] == [TEST_SIZE, TEST_SIZE]


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_meets_the_same_dialogs_as_with_the_embedded_source(walked: Walked, kind: str) -> None:
    """Word by word, and judged alike: reading, judging and feedback have changed nothing on the way."""
    found = walked.dialogs("eval-start", kind)
    assert len(found) == TEST_SIZE
    assert found == walked.dialogs("eval-twin", kind)


def test_the_exported_policy_solves_what_the_run_says_that_it_does(walked: Walked) -> None:
    figures = walked.json("run/summary.json")
    for phase, evaluation in (("start", "eval-start"), ("final", "eval-policy")):
        for name, kind in (("1@3", "true"), ("no_feedback_1@3", "none")):
            assert figures[phase][name] == walked.solved_by_one_dialog(evaluation, kind)
    assert figures["start"]["1@3"] > 0
    assert walked.dialogs("eval-policy", "true") != walked.dialogs("eval-start", "true")


def test_the_comparison_is_of_the_two_evaluations(walked: Walked) -> None:
    rows = walked.json("differences.json")
    assert {row["feedback"] for row in rows} == set(KINDS)
    for row in rows:
        if row["name"] == "1@3" and row["turn_limit"] == 3:
            assert row["first"] == walked.solved_by_one_dialog("eval-start", row["feedback"])
            assert row["second"] == walked.solved_by_one_dialog("eval-policy", row["feedback"])
            assert row["difference"]["value"] == pytest.approx(row["second"] - row["first"])
