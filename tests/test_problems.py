"""Problem files and the order in which training takes problems."""

from __future__ import annotations

import json
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlef.config import Config, ConfigError, ExecutorConfig, ProblemsConfig
from rlef.hidden_conventions import generate
from rlef.problems import Cursor, check, load, read_jsonl, training_cursor, write_jsonl
from rlef.records import Problem
from rlef_sandbox import Test

GOOD = {
    "id": "double",
    "statement": "Print twice the number.",
    "public_tests": [{"input": "2\n", "expected_output": "4\n"}],
    "private_tests": [{"input": "5\n", "expected_output": "10\n"}],
    "time_limit_s": 1.5,
    "memory_limit_bytes": 2_000_000,
    "source": "hand",
}
CALL = {"arguments": [[1, 2], {"a": None}], "expected": 3.5}
VALUE = {"expression": "f((1, 2))", "expected": "{(1, 2): 1e999}"}
RAISES = {"assertion": "assert f(1) == 2"}


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def error_of(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        list(read_jsonl(path, defaults=ExecutorConfig()))
    return str(caught.value)


def test_a_line_becomes_a_problem(tmp_path: Path) -> None:
    (problem,) = read_jsonl(write(tmp_path / "p.jsonl", GOOD), defaults=ExecutorConfig())
    assert problem.statement == "Print twice the number."
    assert problem.public_tests == (Test("2\n", "4\n"),)
    assert (problem.time_limit_s, problem.memory_limit_bytes) == (1.5, 2_000_000)


def test_missing_limits_are_the_settings_defaults(tmp_path: Path) -> None:
    row = {name: value for name, value in GOOD.items() if name not in ("time_limit_s", "memory_limit_bytes")}
    (problem,) = read_jsonl(write(tmp_path / "p.jsonl", row), defaults=ExecutorConfig())
    assert (problem.time_limit_s, problem.memory_limit_bytes) == (10.0, 1_000_000_000)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    problems = list(generate("train", seed=0, size=8))
    write_jsonl(tmp_path / "p.jsonl", iter(problems))
    assert list(read_jsonl(tmp_path / "p.jsonl", defaults=ExecutorConfig())) == problems
    assert [file.name for file in tmp_path.iterdir()] == ["p.jsonl"]


@pytest.mark.parametrize(
    "fields",
    [
        {
            "judge": "exact",
            "flags": ["several_answers"],
            "difficulty": "hard",
            "rating": 1500,
            "solve_rate": 0.0,
        },
        {
            "judge": {"absolute": 1e-6, "relative": 0.0, "ignore_case": True},
            "incorrect_solutions": ["print()"],
        },
        {
            "judge": {"checker": "def check(*texts): return True"},
            "prelude": "import math",
            "starter_code": "d",
        },
        {"judge": {"validator": {"a.cc": "int main() {}", "b.h": ""}, "flags": ["float_tolerance", "1e-6"]}},
        {"judge": {"validator": {"a.c++": "int main() {}"}}},
        {"public_tests": [CALL], "private_tests": [CALL, CALL], "function": "solve"},
        {"public_tests": [VALUE], "private_tests": [VALUE], "function": "f"},
        {"public_tests": [VALUE], "private_tests": [VALUE], "dialect": "evalplus", "stub": "def f(n):\n"},
        {"public_tests": [RAISES], "private_tests": [RAISES], "solutions": ["def f(n): return n + 1"]},
    ],
)
def test_every_field_is_read_and_written_back_as_it_was(tmp_path: Path, fields: dict[str, object]) -> None:
    path, again = write(tmp_path / "p.jsonl", GOOD | fields), tmp_path / "again.jsonl"
    write_jsonl(again, read_jsonl(path, defaults=ExecutorConfig()))
    assert json.loads(again.read_text(encoding="utf-8")) == GOOD | fields


def test_line_ends_of_other_systems_and_a_missing_last_one_change_nothing(tmp_path: Path) -> None:
    plain = write(tmp_path / "p.jsonl", GOOD, GOOD | {"id": "other"})
    lines = plain.read_bytes().splitlines()
    other = tmp_path / "crlf.jsonl"
    other.write_bytes(b"\r\n".join(lines))
    read = [list(read_jsonl(path, defaults=ExecutorConfig())) for path in (plain, other)]
    assert read[0] == read[1]
    assert len(read[0]) == 2


@pytest.mark.parametrize(
    "line", [b'{"id": "\xff"}', b'{"id": "\\ud800"}', b"[" * 100_000, b'{"id": ' + b"9" * 5000 + b"}"]
)
def test_what_is_no_text_or_too_deep_is_named_by_its_line(tmp_path: Path, line: bytes) -> None:
    path = write(tmp_path / "p.jsonl", GOOD)
    path.write_bytes(path.read_bytes() + line + b"\n")
    assert "p.jsonl, line 2: not JSON" in error_of(path)


def test_a_test_beyond_the_limit_is_refused_with_its_size_and_the_setting(tmp_path: Path) -> None:
    path = write(
        tmp_path / "p.jsonl", GOOD | {"private_tests": [{"input": "é" * 40, "expected_output": "1"}]}
    )
    with pytest.raises(ConfigError, match=r"'private_tests.0': 81 bytes, and problems.max_test_bytes = 80"):
        list(read_jsonl(path, defaults=ExecutorConfig(), max_test_bytes=80))
    assert len(list(read_jsonl(path, defaults=ExecutorConfig(), max_test_bytes=81))) == 1


def test_a_validator_may_be_as_large_as_a_test(tmp_path: Path) -> None:
    judge = {"validator": {"a.cc": "x" * 70, "b.h": "x" * 11}}
    path = write(tmp_path / "p.jsonl", GOOD | {"judge": judge})
    with pytest.raises(ConfigError, match=r"'judge.validator': 81 bytes, and problems.max_test_bytes = 80"):
        list(read_jsonl(path, defaults=ExecutorConfig(), max_test_bytes=80))
    assert len(list(read_jsonl(path, defaults=ExecutorConfig(), max_test_bytes=81))) == 1


def test_a_line_without_end_is_refused_before_it_is_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    with path.open("wb") as file:
        file.truncate(200 << 20)  # 200 MB of NULs that take no room on the disk
    tracemalloc.start()
    with pytest.raises(
        ConfigError, match=r"line 1: longer than 16,777,216 bytes; .* problems.max_test_bytes"
    ):
        list(read_jsonl(path, defaults=ExecutorConfig(), max_test_bytes=1 << 20))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40 << 20


def test_a_problem_that_is_a_dialog_with_a_judge_cannot_be_trained_on(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", GOOD | {"flags": ["interactive"]})
    with pytest.raises(ConfigError, match=r"problems.train: .*'double' has the flag 'interactive'"):
        load(Config(problems=ProblemsConfig(train=str(path))), "train")


def test_a_line_that_is_not_json_is_named_by_its_number(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", GOOD)
    path.write_text(path.read_text() + '{"id": \n')
    assert "p.jsonl, line 2: not JSON" in error_of(path)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"statement": 3}, "statement"),
        ({"public_tests": []}, "public_tests"),
        ({"private_tests": [{"input": "1"}]}, "private_tests.0.expected_output"),
        ({"time_limit_s": -1}, "time_limit_s"),
        ({"memory_limit_bytes": "1 GB"}, "memory_limit_bytes"),
        ({"colour": "red"}, "colour"),
        ({"time_limit_s": 0}, "time_limit_s"),
        ({"time_limit_s": 10**9}, "time_limit_s"),
        ({"memory_limit_bytes": 1000}, "memory_limit_bytes"),
        ({"memory_limit_bytes": 10**18}, "memory_limit_bytes"),
        ({"judge": "any"}, "judge"),
        ({"judge": {"absolute": -1}}, "judge.absolute"),
        ({"judge": {"validator": {}}}, "judge.validator"),
        ({"judge": {"validator": {"a.cc": 1}}}, "judge.validator.a.cc"),
        ({"judge": {"validator": {"a.h": ""}}}, "judge.validator"),
        ({"judge": {"validator": {"a.cc": "", "../b.h": ""}}}, "judge.validator"),
        ({"judge": {"validator": {"a.cc": "", "b.py": ""}}}, "judge.validator"),
        ({"judge": {"validator": {"-o.cc": ""}}}, "judge.validator"),
        ({"judge": {"validator": {"a.cc": ""}, "checks": 1}}, "judge.checks"),
        ({"judge": {"validator": {"a.cc": ""}, "flags": "a"}}, "judge.flags"),
        ({"judge": {"validator": {"a.cc": ""}, "flags": ["a\0"]}}, "judge.flags"),
        ({"judge": {"validator": {"a.cc": ""}, "flags": ["a" * 70_000]}}, "judge.flags"),
        (
            {"judge": {"validator": {"a.cc": ""}}, "public_tests": [VALUE], "private_tests": [VALUE]},
            "judge.validator",
        ),
        ({"flags": ["easy"]}, "flags.0"),
        ({"solve_rate": 1.5}, "solve_rate"),
        ({"function": "f"}, "function"),
        ({"function": "f g", "public_tests": [CALL], "private_tests": [CALL]}, "function"),
        ({"public_tests": [CALL], "private_tests": [CALL]}, "function"),
        ({"private_tests": [CALL]}, "private_tests"),
        ({"public_tests": [CALL | {"input": "1"}]}, "public_tests.0.input"),
        (
            {"public_tests": [VALUE], "private_tests": [VALUE | {"expected": "f()"}]},
            "private_tests.0.expected",
        ),
        ({"public_tests": [RAISES], "private_tests": [{"assertion": " "}]}, "private_tests.0.assertion"),
        ({"dialect": "mine"}, "dialect"),
        ({"dialect": "evalplus"}, "dialect"),
        ({"stub": "```\n"}, "stub"),
    ],
)
def test_a_bad_field_is_reported_with_its_line_and_name(
    tmp_path: Path, change: dict[str, object], field: str
) -> None:
    path = write(tmp_path / "p.jsonl", GOOD, GOOD | {"id": "other"} | change)
    assert f"p.jsonl, line 2: field '{field}'" in error_of(path)


def test_one_dialect_for_all_takes_the_stub_into_the_statement(tmp_path: Path) -> None:
    fields = {
        "public_tests": [RAISES],
        "private_tests": [RAISES],
        "dialect": "evalplus",
        "stub": "def f(n):\n",
    }
    path = str(write(tmp_path / "p.jsonl", GOOD | fields))
    (own,) = load(Config(problems=ProblemsConfig(train=path)), "train")
    (one,) = load(Config(problems=ProblemsConfig(train=path, dialect="code_contests")), "train")
    assert (own.dialect, own.stub, own.statement) == ("evalplus", "def f(n):\n", GOOD["statement"])
    assert (one.dialect, one.stub) == ("code_contests", "")
    assert one.statement.endswith("\n\nBegin your program with this:\n\ndef f(n):\n")


def test_an_id_that_comes_twice_names_both_lines(tmp_path: Path) -> None:
    assert "line 2: id 'double' was used on line 1" in error_of(write(tmp_path / "p.jsonl", GOOD, GOOD))


def test_an_empty_file_is_an_error_that_says_what_to_put_in(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl")
    with pytest.raises(
        ConfigError, match=r"problems.train: .* holds no problem; put one JSON object on each line"
    ):
        load(Config(problems=ProblemsConfig(train=str(path))), "train")


def test_a_missing_file_and_an_unknown_split_name_the_setting() -> None:
    for source in ("nowhere.jsonl", "hidden_conventions:test"):
        with pytest.raises(ConfigError, match=r"problems.eval: .*hidden_conventions:train"):
            load(Config(problems=ProblemsConfig(eval=source)), "eval")


def test_a_check_finds_the_errors_of_both_sources() -> None:
    check(Config())
    for part in ("train", "eval"):
        with pytest.raises(ConfigError, match=rf"problems.{part}: there is no file 'nowhere.jsonl'"):
            check(Config(problems=ProblemsConfig(**{part: "nowhere.jsonl"})))


def test_the_embedded_source_gives_as_many_problems_as_the_settings_say() -> None:
    settings = ProblemsConfig(train_size=5, eval_size=3, seed=11)
    assert load(Config(problems=settings), "train") == list(generate("train", seed=11, size=5))
    assert load(Config(problems=settings), "eval") == list(generate("heldout", seed=11, size=3))


@given(st.integers(1, 9), st.lists(st.integers(1, 7), max_size=8))
def test_each_round_of_the_cursor_takes_every_problem_once(count: int, chunks: list[int]) -> None:
    cursor = Cursor(list(generate("train", seed=0, size=count)), seed=4)
    taken = [problem for chunk in chunks for problem in cursor.take(chunk)]
    for start in range(0, len(taken) - count + 1, count):
        assert len({problem.id for problem in taken[start : start + count]}) == count


@given(st.integers(0, 30), st.integers(1, 7))
def test_a_cursor_at_a_saved_position_goes_on_as_the_first_would_have(position: int, count: int) -> None:
    problems = list(generate("train", seed=0, size=5))
    first = Cursor(problems, seed=4)
    first.take(position)
    assert Cursor(problems, seed=4, position=position).take(count) == first.take(count)


def test_rounds_come_in_different_orders() -> None:
    cursor = Cursor(list(generate("train", seed=0, size=16)), seed=0)
    assert cursor.take(16) != cursor.take(16)


RATED = [
    replace(problem, solve_rate=rate)
    for problem, rate in zip(generate("train", seed=0, size=6), [0.5, 0.0, 1.0, 0.5, 0.25, 0.5], strict=True)
]


def easy_first(problems: list[Problem]) -> Cursor:
    return training_cursor(problems, Config(problems=ProblemsConfig(order="easy_first")))


def test_easy_first_takes_each_round_from_the_easiest_to_the_hardest_and_shuffles_equals() -> None:
    cursor = easy_first(RATED)
    rounds = [cursor.take(6) for _ in range(12)]
    assert all([problem.solve_rate for problem in each] == [1.0, 0.5, 0.5, 0.5, 0.25, 0.0] for each in rounds)
    assert len({tuple(problem.id for problem in each) for each in rounds}) > 1


def test_without_solve_rates_the_rating_says_what_is_easy() -> None:
    rated = [
        replace(problem, solve_rate=None, rating=rating)
        for problem, rating in zip(RATED[:3], [2000, 800, 1200], strict=True)
    ]
    assert [problem.rating for problem in easy_first(rated).take(3)] == [800, 1200, 2000]


def test_easy_first_without_a_measure_for_all_is_refused_with_one_that_lacks_it(tmp_path: Path) -> None:
    settings = ProblemsConfig(train=str(tmp_path / "p.jsonl"), order="easy_first")
    write(tmp_path / "p.jsonl", GOOD | {"solve_rate": 0.5}, GOOD | {"id": "other"})
    with pytest.raises(
        ConfigError,
        match=r"^problems\.order = 'easy_first', and 1 of 2 problems, such as 'other', have no solve_rate",
    ):
        load(Config(problems=settings), "train")
    with pytest.raises(ConfigError, match=r"^problems\.order = 'easy_first', and nothing says how hard "):
        check(Config(problems=ProblemsConfig(order="easy_first")))
