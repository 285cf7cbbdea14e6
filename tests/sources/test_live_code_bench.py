"""LiveCodeBench's rows, and the pickles in them, none of which is unpickled."""

from __future__ import annotations

import base64
import collections
import json
import pickle
import struct
import zlib
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from rlef.records import Problem
from rlef.sources.common import Found, Reason, SetAside, UnusableProblemError
from rlef.sources.live_code_bench import text_of_pickle
from rlef_sandbox import Call, Executor, Test
from tests.sources import examples


def only(path: Path) -> Problem:
    (found,) = examples.read("livecodebench", path)
    assert isinstance(found, Found), found
    return found.problem


def test_a_problem_on_standard_input(tmp_path: Path) -> None:
    problem = only(examples.json_lines(tmp_path / "test6.jsonl", [examples.LIVE_CODE_BENCH_ROW]))
    assert problem.public_tests == (Test("1 2\n", "3\n"),)
    assert problem.private_tests == (Test("2 2", "4"),)
    assert (problem.id, problem.source, problem.difficulty) == ("abc900_a", "live_code_bench/atcoder", "easy")


def test_the_same_row_as_parquet_is_the_same_problem(tmp_path: Path) -> None:
    path = tmp_path / "test.parquet"
    parquet.write_table(pa.Table.from_pylist([examples.LIVE_CODE_BENCH_ROW]), path)
    lines = examples.json_lines(tmp_path / "test.jsonl", [examples.LIVE_CODE_BENCH_ROW])
    assert only(path) == only(lines)


def test_a_method_is_called_with_the_lines_as_arguments(tmp_path: Path, executor: Executor) -> None:
    problem = only(examples.json_lines(tmp_path / "test.jsonl", [examples.LEETCODE_ROW]))
    assert problem.public_tests == (Call([[1, 2], 3], 6),)
    assert problem.private_tests == (Call([[], 0], 0),)
    assert "Begin with this code:\n```python\nclass Solution:" in problem.statement
    body = "def addAll(self, n: List[int], s: int) -> int: return pow(sum(n) + s, 1, 99)"
    program = f"class Solution:\n    {body}"
    assert examples.passes(executor, problem, program)
    assert not examples.passes(executor, problem, program.replace("+ s", ""))


@pytest.mark.parametrize(
    ("output", "is_right"),
    [("3", True), (" 3.0 \n", True), ("3\n\n4", False), ("3.00001", False), ("three", False)],
)
def test_lines_are_compared_as_exact_decimal_numbers(
    tmp_path: Path, executor: Executor, output: str, is_right: bool
) -> None:
    tests = {"private_test_cases": json.dumps(examples.STDIN_TESTS)}
    problem = only(examples.json_lines(tmp_path / "test.jsonl", [examples.LIVE_CODE_BENCH_ROW | tests]))
    assert examples.passes(executor, problem, f"print({output!r})") is is_right


@given(st.text(), st.integers(0, pickle.HIGHEST_PROTOCOL))
def test_the_pickle_of_a_text_is_that_text(text: str, protocol: int) -> None:
    if protocol == 0:  # has no code for the text's length, and is not what the files hold
        with pytest.raises(UnusableProblemError):
            text_of_pickle(pickle.dumps(text, protocol))
    else:
        assert text_of_pickle(pickle.dumps(text, protocol)) == text


class Touch:
    """Unpickling it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return open, (str(self.path), "w")


def packed(pickled: bytes) -> str:
    return base64.b64encode(zlib.compress(pickled)).decode()


def bomb() -> bytes:
    """Doubles a list forty times."""
    value: list[object] = ["x"]
    for _ in range(40):
        value = [value, value]
    return pickle.dumps(value)


MEMO_OF_FOUR_GIGABYTES = b"\x80\x04X\x02\x00\x00\x00[]r" + struct.pack("<I", 2**32 - 1) + b"."


def test_a_pickle_that_would_execute_something_is_set_aside(tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    pickle.loads(pickle.dumps(Touch(touched))).close()
    assert touched.exists()
    touched.unlink()
    row = examples.LIVE_CODE_BENCH_ROW | {"private_test_cases": packed(pickle.dumps(Touch(touched)))}
    (outcome,) = examples.read("livecodebench", examples.json_lines(tmp_path / "test.jsonl", [row]))
    assert isinstance(outcome, SetAside)
    assert outcome.reason is Reason.UNREADABLE
    assert "a pickle with STACK_GLOBAL" in outcome.detail
    assert not touched.exists()


@pytest.mark.parametrize(
    ("private", "reason", "said"),
    [
        (packed(bomb()), Reason.UNREADABLE, "a pickle with EMPTY_LIST"),
        (packed(MEMO_OF_FOUR_GIGABYTES), Reason.NO_PRIVATE_TESTS, ""),
        (packed(pickle.dumps(collections.OrderedDict())), Reason.UNREADABLE, "a pickle with"),
        (packed(pickle.dumps("[]")[:-4]), Reason.UNREADABLE, "broken pickle"),
        (packed(b""), Reason.UNREADABLE, "broken pickle"),
        (packed(pickle.dumps("[" * 100_000)), Reason.UNREADABLE, "nested too deep"),
        (packed(pickle.dumps('["\\ud800"]')), Reason.UNREADABLE, "surrogates not allowed"),
        ("%%%", Reason.UNREADABLE, "not base64"),
        (base64.b64encode(b"no zlib").decode(), Reason.UNREADABLE, "not base64 of zlib"),
        (packed(bytes(5 << 20)), Reason.TOO_LARGE, "unpacks to more than 4,194,304 bytes"),
        ('[{"input": "1", "output": "1", "testtype": "functional"}]', Reason.INVALID, "of type functional"),
        ('[{"input": 1, "output": "1", "testtype": "stdin"}]', Reason.INVALID, "'private_test_cases.input'"),
        ("[3]", Reason.INVALID, "no JSON list of tests"),
    ],
)
def test_private_tests_that_cannot_be_read_are_told_and_the_next_row_is_read(
    tmp_path: Path, private: str, reason: Reason, said: str
) -> None:
    rows = [examples.LIVE_CODE_BENCH_ROW | {"private_test_cases": private}, examples.LIVE_CODE_BENCH_ROW]
    path = examples.json_lines(tmp_path / "test.jsonl", rows)
    bad, good = examples.read("livecodebench", path, max_test_bytes=1 << 18)
    assert isinstance(bad, SetAside)
    assert bad.reason is reason
    assert said in bad.detail
    assert isinstance(good, Found)
