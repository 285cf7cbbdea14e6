"""Whole conversions: what is written, what is reported, and that a file is whole or not there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from rlef.cli import main
from rlef.config import ConfigError, ExecutorConfig
from rlef.problems import read_jsonl
from rlef.sources.convert import FORMATS, USES_SANDBOX, convert
from rlef_sandbox import Executor
from tests.small_runs import read_lines, run_here
from tests.sources import examples


def rlef(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def published(folder: Path, format_name: str) -> Path:
    """A small set in that format."""
    lines = {
        "humaneval": examples.HUMAN_EVAL_ROWS,
        "humanevalplus": [examples.HUMAN_EVAL_PLUS_ROW],
        "mbppplus": [examples.MBPP_PLUS_ROW],
        "livecodebench": [examples.LIVE_CODE_BENCH_ROW, examples.LEETCODE_ROW],
        "apps": [examples.APPS_ROW, examples.APPS_FUNCTION_ROW],
        "taco": [examples.TACO_ROW],
        "codeio": [examples.CODEIO_ROW],
    }
    if format_name in lines:
        return examples.json_lines(folder / "published.jsonl.gz", lines[format_name])
    if format_name == "codecontests":
        return examples.code_contests(folder / "published.parquet", {})
    if format_name == "verl":
        return examples.verl(folder / "published.parquet", {})
    return examples.kattis(folder, "double")


def test_every_format_gives_problems_whose_own_solutions_pass(tmp_path: Path) -> None:
    with Executor(workers=1) as executor:
        for name in FORMATS:
            folder = tmp_path / name
            folder.mkdir()
            made = convert(
                name,
                [published(folder, name)],
                tmp_path / f"{name}.jsonl",
                choices=examples.choices(),
                executor=executor if name in USES_SANDBOX else None,
            )
            assert (made.written > 0, made.set_aside) == (True, []), name
            assert (
                len(list(read_jsonl(tmp_path / f"{name}.jsonl", defaults=ExecutorConfig()))) == made.written
            )
    files = sorted(tmp_path.glob("*.jsonl"))
    assert len(files) == len(FORMATS)
    together = tmp_path / "all.jsonl"
    together.write_text("".join(file.read_text(encoding="utf-8") for file in files), encoding="utf-8")
    result = rlef("problems", "check", together, "--runs", "1", "--output", tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert found["problems_with"] == {"failing": 0, "accepted": 0, "flaky": 0, "leaks": 1, "faults": 0}
    assert [check["id"] for check in found["amiss"]] == ["HumanEval/901"]
    assert found["solutions"] >= len(FORMATS) - 1
    assert result.exit_code == 1


def test_a_converted_set_is_trained_and_evaluated_on(tmp_path: Path) -> None:
    changes: list[examples.Row] = [
        {"name": f"{n}", "description": f"Print {n} times the number."} for n in range(4)
    ]
    path = examples.code_contests(tmp_path / "train.parquet", *changes)
    problems = tmp_path / "train.jsonl"
    convert("codecontests", [path], problems, choices=examples.choices())
    run = run_here(tmp_path, f"problems.train={problems}", f"problems.eval={problems}", "run.steps=1")
    (step,) = read_lines(run / "metrics.jsonl")
    assert step["tests_run"] > 0
    assert json.loads((run / "summary.json").read_text(encoding="utf-8"))["final"] is not None


def test_the_command_counts_and_names_what_it_leaves_out(tmp_path: Path) -> None:
    path = examples.code_contests(
        tmp_path / "train.parquet",
        {},
        {"name": "B", "private_tests": {"input": [], "output": []}, "description": "Other."},
        {"name": "C", "description": "This is an interactive problem."},
        {"name": "D", "description": "Find any one."},
    )
    report = tmp_path / "report.json"
    result = rlef("problems", "convert", "codecontests", path, tmp_path / "t.jsonl", "--report", report)
    assert result.exit_code == 0, result.output
    lines = [line.strip() for line in result.output.splitlines()]
    assert lines == [
        "2  problems written",
        "1  of them flagged: several_answers",
        "1  set aside, no private tests: B (the source gives none)",
        "1  set aside, interactive: C (the statement says 'interactive problem')",
        f"wrote {tmp_path / 't.jsonl'}",
    ]
    told = json.loads(report.read_text(encoding="utf-8"))
    assert told["written"] == 2
    assert [(each["id"], each["place"]) for each in told["set_aside"]] == [
        ("B", f"{path}, row 2"),
        ("C", f"{path}, row 3"),
    ]


def test_statements_that_come_twice_are_reported_within_a_file_and_across_splits(tmp_path: Path) -> None:
    train = examples.code_contests(
        tmp_path / "train.parquet", {"name": "A"}, {"name": "A", "description": "given N,  print 2n."}
    )
    test = examples.code_contests(
        tmp_path / "test.parquet", {"name": "T"}, {"name": "U", "description": "New."}
    )
    made = convert("codecontests", [train], tmp_path / "train.jsonl", choices=examples.choices())
    assert [(twin.id, twin.of, twin.file) for twin in made.duplicates] == [("A", "A", "this file")]
    ids = [problem.id for problem in read_jsonl(tmp_path / "train.jsonl", defaults=ExecutorConfig())]
    assert ids == ["A", "A~2"]
    for drop, written in ((False, 2), (True, 1)):
        across = convert(
            "codecontests",
            [test],
            tmp_path / "test.jsonl",
            choices=examples.choices(),
            against=[tmp_path / "train.jsonl"],
            drop_duplicates=drop,
        )
        assert [(twin.id, twin.of) for twin in across.duplicates] == [("T", "A")]
        assert across.written == written


def test_a_file_that_is_broken_leaves_what_was_there_before(tmp_path: Path) -> None:
    good = examples.json_lines(tmp_path / "good.jsonl.gz", [examples.APPS_ROW])
    bad = tmp_path / "bad.jsonl.gz"
    bad.write_bytes(good.read_bytes()[:-9])
    output = tmp_path / "out.jsonl"
    output.write_text("before")
    with pytest.raises(ConfigError, match=r"bad.jsonl.gz: not a whole gzip file"):
        convert("apps", [good, bad], output, choices=examples.choices())
    assert output.read_text() == "before"
    assert {file.name for file in tmp_path.iterdir()} == {"good.jsonl.gz", "bad.jsonl.gz", "out.jsonl"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("jsonl", "a", "b"), "there is no format 'jsonl'; use one of codecontests, humaneval,"),
        (("apps", "nowhere.jsonl", "b"), "nowhere.jsonl: there is no such file"),
        (("apps", "/dev/null", "/proc/no/b"), "cannot be written"),
    ],
)
def test_what_cannot_be_converted_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = rlef("problems", "convert", *arguments)
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("rlef: error: ")
    assert message in line
