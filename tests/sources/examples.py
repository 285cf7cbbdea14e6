"""Small problem sets of our own in the exact formats that the field publishes, oddities included."""

from __future__ import annotations

import base64
import gzip
import json
import pickle
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from rlef.config import Config
from rlef.judging import job_of
from rlef.records import Problem
from rlef.sources.common import Choices, Found, SetAside
from rlef.sources.convert import FORMATS
from rlef_sandbox import Executor, Verdict

Row = dict[str, Any]


def choices(**changes: Any) -> Choices:
    defaults = Config()
    fields = {
        "defaults": defaults.executor,
        "max_test_bytes": defaults.problems.max_test_bytes,
        "public_tests": 1,
        "generated_tests": False,
        "solutions": 5,
    }
    return Choices(**fields | changes)


def read(
    format_name: str, path: Path, executor: Executor | None = None, **changes: Any
) -> list[Found | SetAside]:
    return list(FORMATS[format_name](path, choices(**changes), executor))


def passes(executor: Executor, problem: Problem, program: str) -> bool:
    """All tests, public and private."""
    tests = [*problem.public_tests, *problem.private_tests]
    (results,) = executor.run_many([job_of(problem, program, tests)])
    return all(result.verdict is Verdict.PASSED for result in results)


def json_lines(path: Path, rows: Sequence[Row]) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode(), mtime=0))
    else:
        path.write_text(text, encoding="utf-8")
    return path


# CodeContests: the schema that deepmind/code_contests has on the hub.

_TESTS = pa.struct([("input", pa.list_(pa.string())), ("output", pa.list_(pa.string()))])
_PROGRAMS = pa.struct([("language", pa.list_(pa.int64())), ("solution", pa.list_(pa.string()))])
_DURATION = pa.struct([("seconds", pa.int64()), ("nanos", pa.int64())])
CODE_CONTESTS_SCHEMA = pa.schema(
    [
        ("name", pa.string()),
        ("description", pa.string()),
        ("public_tests", _TESTS),
        ("private_tests", _TESTS),
        ("generated_tests", _TESTS),
        ("source", pa.int64()),
        ("difficulty", pa.int64()),
        ("solutions", _PROGRAMS),
        ("incorrect_solutions", _PROGRAMS),
        ("cf_contest_id", pa.int64()),
        ("cf_index", pa.string()),
        ("cf_points", pa.float32()),
        ("cf_rating", pa.int32()),
        ("cf_tags", pa.list_(pa.string())),
        ("is_description_translated", pa.bool_()),
        ("untranslated_description", pa.string()),
        ("time_limit", _DURATION),
        ("memory_limit_bytes", pa.int64()),
        ("input_file", pa.string()),
        ("output_file", pa.string()),
    ]
)
PYTHON2, CPP, PYTHON3 = 1, 2, 3
CODE_CONTESTS_ROW: Row = {
    "name": "1_A. Doubling",
    "description": "Given n, print 2n.",
    "public_tests": {"input": ["2\n"], "output": ["4\n"]},
    "private_tests": {"input": ["3\r\n", "5"], "output": ["6", "10\n\n"]},
    "generated_tests": {"input": ["7\n"], "output": ["14\n"]},
    "source": 2,
    "difficulty": 7,
    "solutions": {
        "language": [CPP, PYTHON3, PYTHON2],
        "solution": ["int main() {}", "print(2 * int(input()))", "print 2 * input()"],
    },
    "incorrect_solutions": {"language": [PYTHON3], "solution": ["print(int(input()) ** 2)"]},
    "cf_contest_id": 1,
    "cf_index": "A",
    "cf_points": 500.0,
    "cf_rating": 800,
    "cf_tags": ["math"],
    "is_description_translated": False,
    "untranslated_description": "",
    "time_limit": {"seconds": 1, "nanos": 500_000_000},
    "memory_limit_bytes": 256_000_000,
    "input_file": "",
    "output_file": "",
}


def code_contests(path: Path, *changes: Row) -> Path:
    """One row per change."""
    rows = [CODE_CONTESTS_ROW | change for change in changes]
    parquet.write_table(pa.Table.from_pylist(rows, schema=CODE_CONTESTS_SCHEMA), path)
    return path


# HumanEval, and evalplus' extensions of it and of MBPP.

HUMAN_EVAL_ROWS: list[Row] = [
    {
        "task_id": "HumanEval/900",
        "prompt": "from typing import List\n\n\ndef add_all(numbers: List[int], start: int) -> int:\n"
        '    """ Add numbers to start.\n    >>> add_all([1, 2], 3)\n    6\n    """\n',
        "entry_point": "add_all",
        "canonical_solution": "    return sum(numbers) + start\n",
        "test": "\n\nMETADATA = {\n    'author': 'us'\n}\n\n\ndef check(candidate):\n"
        "    assert candidate([1, 2], 3) == 6\n    assert candidate([], 1) == 1, 'empty'\n\n",
    },
    {
        "task_id": "HumanEval/901",
        "prompt": "def helper(n: int):\n    return n + 1\n\n\ndef twice(n: int):\n"
        '    """ helper of n, twice."""\n',
        "entry_point": "twice",
        "canonical_solution": "    return helper(helper(n))\n",
        "test": "def check(candidate):\n    import random\n    for _ in range(3):\n"
        "        n = random.randrange(9)\n        assert candidate(n) == n + 2\n",
    },
]
HUMAN_EVAL_PLUS_ROW: Row = {
    "task_id": "HumanEval/902",
    "prompt": 'import math\n\n\ndef halves(numbers):\n    """ Half of each number."""\n',
    "contract": "\n    assert isinstance(numbers, list) # $_CONTRACT_$\n",
    "entry_point": "halves",
    "canonical_solution": "    return [number / 2 for number in numbers]\n",
    "base_input": [[[1, 2]], [[]]],
    "plus_input": [[[3.5]], [[10**12]], [[float("inf")]]],
    "atol": 0,
}
MBPP_PLUS_ROW: Row = {
    "task_id": "Mbpp/2",
    "prompt": '"""\nWrite a function to find the shared elements from the given two lists.\n'
    "assert set(similar_elements((3, 4, 5, 6),(5, 7, 4, 10))) == set((4, 5))\n" + '"""\n',
    "entry_point": "similar_elements",
    "canonical_solution": "\ndef similar_elements(one, two):\n    assert type(one) is tuple\n"
    "    return tuple(set(one) & set(two))\n",
    "base_input": [[[3, 4, 5, 6], [5, 7, 4, 10]]],
    "contract": "\n    assert isinstance(one, tuple) # $_CONTRACT_$\n",
    "assertion": "\n\nassert set(similar_elements((1, 2),(2, 3))) == {2}",
    "atol": 0,
    "plus_input": [[[1, 2, 3], []], [[1, 2], [2, 1]]],
}


# LiveCodeBench.


def packed(tests: Sequence[Row]) -> str:
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(tests)))).decode()


STDIN_TESTS = [{"input": "1 2\n", "output": "3\n", "testtype": "stdin"}]
LIVE_CODE_BENCH_ROW: Row = {
    "question_title": "Sum",
    "question_content": "Print the sum.",
    "platform": "atcoder",
    "question_id": "abc900_a",
    "contest_id": "abc900",
    "contest_date": "2024-01-06T00:00:00",
    "starter_code": "",
    "difficulty": "easy",
    "public_test_cases": json.dumps(STDIN_TESTS),
    "private_test_cases": packed([{"input": "2 2", "output": "4", "testtype": "stdin"}]),
    "metadata": "{}",
}
LEETCODE_ROW: Row = LIVE_CODE_BENCH_ROW | {
    "platform": "leetcode",
    "question_id": "9001",
    "starter_code": "class Solution:\n    def addAll(self, numbers: List[int], start: int) -> int:\n        ",
    "public_test_cases": json.dumps([{"input": "[1, 2]\n3", "output": "6", "testtype": "functional"}]),
    "private_test_cases": json.dumps([{"input": "[]\n0", "output": "0", "testtype": "functional"}]),
    "metadata": '{"func_name": "addAll"}',
}


# APPS, TACO and verl.

APPS_ROW: Row = {
    "problem_id": 12,
    "question": "Print the sum of two numbers.",
    "solutions": json.dumps(
        ["print(sum(map(int, input().split())))", "a, b = map(int, input().split())\nprint(a+b)"]
    ),
    "input_output": json.dumps({"inputs": ["1 2\n", ["3 4"]], "outputs": ["3\n", ["7"]]}),
    "difficulty": "introductory",
    "url": "https://example.org/12",
    "starter_code": "",
}
APPS_FUNCTION_ROW: Row = APPS_ROW | {
    "problem_id": 13,
    "question": "Reverse a list.",
    "solutions": json.dumps(
        ["class Solution:\n    def reverse(self, x: List[int]) -> List[int]:\n        return x[::-1]"]
    ),
    "input_output": json.dumps(
        {"fn_name": "reverse", "inputs": [[[1, 2]], [[3]]], "outputs": [[[2, 1]], [3]]}
    ),
    "starter_code": "class Solution:\n    def reverse(self, x: List[int]) -> List[int]:\n",
}
TACO_ROW: Row = {name: value for name, value in APPS_ROW.items() if name != "problem_id"} | {
    "difficulty": "EASY",
    "raw_tags": "['Math']",
    "name": None,
    "source": "codeforces",
    "tags": "['Mathematics']",
    "skill_types": "[]",
    "url": None,
    "Expected Auxiliary Space": None,
    "time_limit": "2.0 seconds",
    "date": None,
    "picture_num": None,
    "memory_limit": "256.0 megabytes",
    "Expected Time Complexity": None,
}
VERL_ROW: Row = {
    "data_source": "codecontests",
    "prompt": [
        {"role": "system", "content": "Think first."},
        {"role": "user", "content": "Print the sum of two numbers."},
    ],
    "ability": "code",
    "reward_model": {"style": "rule", "ground_truth": APPS_ROW["input_output"]},
    "extra_info": {"index": 3, "split": "train"},
}


def verl(path: Path, *changes: Row) -> Path:
    parquet.write_table(pa.Table.from_pylist([VERL_ROW | change for change in changes]), path)
    return path


# Code I/O, as reasoning-gym ships it.

CODEIO_ROW: Row = {
    "task_description": "Given a list, what is its sum, and how many elements has it?",
    "input_output_spec": "Input:\n  `numbers` (list of int)\n\nOutput:\n  `return` (tuple)",
    "code_sample": "# main function\ndef main_solution(numbers):\n    return sum(numbers) / 2, len(numbers)",
    "input_generator": "def generate_inputs(rng: Random) -> dict:\n"
    '    return {"numbers": [rng.randint(1, 9) for _ in range(4)]}',
    "unique_inputs": 1000,
}


# Kattis: packages whose submissions carry their verdict in their folder.

_VALIDATOR = """#!/usr/bin/env python3
import os, sys

# accepts any two numbers from 0 whose sum is that of the input
with open(sys.argv[1]) as question, open(sys.argv[2]) as answer:
    total = int(question.read())
    answer.read()
open(os.path.join(sys.argv[3], "judgemessage.txt"), "w").write("read")
try:
    first, second = map(int, sys.stdin.read().split())
except ValueError:
    sys.exit(43)
assert "strict" in sys.argv[4:]
sys.exit(42 if first >= 0 and second >= 0 and first + second == total else 43)
"""
_CPP_VALIDATOR = r"""#include "validate.h"
#include <cstring>

// accepts any two numbers whose sum is that of the input; flags as the package gives them
int main(int argc, char** argv) {
    std::ifstream question(argv[1]), answer(argv[2]);
    std::ofstream message(argv[3] + std::string("judgemessage.txt"));
    long total, first, second, known;
    question >> total;
    if (!(answer >> known) || !(message << "read" << std::flush)) return 1;
    if (argc != 6 || std::strcmp(argv[4], "strict") || std::strcmp(argv[5], "it's $HOME")) return 1;
    return std::cin >> first >> second && first + second == total ? YES : NO;
}
"""
KATTIS_FILES: dict[str, dict[str, str]] = {
    "double": {  # the default validator; CRLF and a missing last line end
        "problem.yaml": "name: Double\nlicense: cc0\n",
        "problem_statement/problem.en.tex": "\\problemname{Double}\nPrint $2n$.\n",
        "data/sample/1.in": "2\n",
        "data/sample/1.ans": "4\n",
        "data/secret/1.in": "3\r\n",
        "data/secret/1.ans": "6",
        "data/secret/large/2.in": "1000000\n",
        "data/secret/large/2.ans": "2000000\n",
        "submissions/accepted/main.py": "print(2 * int(input()))",
        "submissions/accepted/spaces.py": "print(end=f'\\n  {2 * int(input())}\\n\\n')",
        "submissions/accepted/other.cpp": "int main() {}",
        "submissions/wrong_answer/square.py": "print(int(input()) ** 2)",
        "submissions/wrong_answer/float.py": "print(2.0 * int(input()))",
        "submissions/run_time_error/crash.py": "print(2 * int(input()) if input else 1 / 0); 1 / 0",
        "submissions/time_limit_exceeded/slow.py": "while True: pass",
        ".timelimit": "1\n",
    },
    "third": {  # a tolerance, and words in any case
        "problem.yaml": "name: {en: Third}\nvalidator_flags: float_tolerance 1e-6\nlimits: {memory: 512}\n",
        "problem_statement/problem.tex": "Print n/3 and Done.\n",
        "data/sample/a.in": "1\n",
        "data/sample/a.ans": "0.333333333 Done\n",
        "data/secret/b.in": "2\n",
        "data/secret/b.ans": "0.666666666 Done\n",
        "submissions/accepted/main.py": "print(int(input()) / 3, 'done')",
        "submissions/accepted/exponent.py": "print(f'{int(input()) / 3:e} DONE')",
        "submissions/wrong_answer/rounded.py": "print(round(int(input()) / 3, 4), 'Done')",
        "submissions/wrong_answer/word.py": "print(int(input()) / 3, 'finished')",
        "domjudge-problem.ini": "timelimit='2'\n",
    },
    "table": {  # blanks and case count
        "problem.yaml": "validation: default\nvalidator_flags: case_sensitive space_change_sensitive\n",
        "problem_statement/problem.en.md": "Print the words in two lines.\n",
        "data/sample/a.in": "A b\n",
        "data/sample/a.ans": "A\nb\n",
        "data/secret/b.in": "C d\n",
        "data/secret/b.ans": "C\nd\n",
        "submissions/accepted/main.py": "print(*input().split(), sep='\\n')",
        "submissions/wrong_answer/one_line.py": "print(*input().split())",
        "submissions/wrong_answer/lower.py": "print(*input().lower().split(), sep='\\n')",
        "submissions/wrong_answer/two_ends.py": "print(*input().split(), sep='\\n', end='\\n\\n')",
    },
    "parts": {  # a validator of its own, in version 2023-07
        "problem.yaml": "problem_format_version: 2023-07-draft\nlimits: {time_limit: 1.5}\n",
        "statement/problem.en.md": "Print two numbers from 0 with this sum.\n",
        "output_validator/validator.py": _VALIDATOR,
        "data/test_group.yaml": "output_validator_args: [strict]\n",
        "data/sample/a.in": "5\n",
        "data/sample/a.ans": "5 0\n",
        "data/secret/b.in": "9\n",
        "data/secret/b.ans": "9 0\n",
        "submissions/accepted/first.py": "print(int(input()), 0)",
        "submissions/accepted/last.py": "n = int(input())\nprint(1, n - 1)",
        "submissions/wrong_answer/negative.py": "print(int(input()) + 1, -1)",
        "submissions/wrong_answer/words.py": "print('five', 'zero')",
        "submissions/rejected/nothing.py": "input()",
    },
    "terms": {  # a validator in C++, in a folder with its header
        "problem.yaml": 'validation: custom\nvalidator_flags: strict "it\'s $HOME"\n',
        "problem_statement/problem.en.tex": "Print two numbers with this sum.\n",
        "output_validators/check/validate.cc": _CPP_VALIDATOR,
        "output_validators/check/validate.h": "#include <fstream>\n#include <iostream>\n"
        "enum { YES = 42, NO = 43 };\n",
        "output_validators/check/.gitignore": "a.out\n",
        "data/sample/a.in": "5\n",
        "data/sample/a.ans": "5 0\n",
        "data/secret/b.in": "9\n",
        "data/secret/b.ans": "9 0\n",
        "submissions/accepted/first.py": "print(int(input()), 0)",
        "submissions/accepted/lines.py": "n = int(input())\nprint(n + 1)\nprint(-1)",
        "submissions/wrong_answer/one.py": "print(int(input()))",
        "submissions/wrong_answer/words.py": "print('five', 'zero')",
    },
    "triple": {  # scores, which are full where all tests pass
        "problem.yaml": "type: scoring\ngrading: {show_test_data_groups: true}\n",
        "problem_statement/problem.en.tex": "Print $3n$.\n",
        "data/testdata.yaml": "on_reject: continue\nrange: 0 100\ngrader_flags: ignore_sample\n",
        "data/sample/testdata.yaml": "range: 0 0\naccept_score: 0\ngrader_flags: first_error\n",
        "data/sample/a.in": "1\n",
        "data/sample/a.ans": "3\n",
        "data/secret/testdata.yaml": "grader_flags: first_error accept_if_any_accepted\n",
        "data/secret/g1/testdata.yaml": "accept_score: 40\nrange: 0 40\ngrader_flags: min\n",
        "data/secret/g1/a.in": "2\n",
        "data/secret/g1/a.ans": "6\n",
        "data/secret/g2/testdata.yaml": "accept_score: 60\nrange: 0 60\ngrader_flags: min\n",
        "data/secret/g2/a.in": "10\n",
        "data/secret/g2/a.ans": "30\n",
        "data/secret/g2/b.in": "11\n",
        "data/secret/g2/b.ans": "33\n",
        "submissions/accepted/main.py": "print(3 * int(input()))",
        "submissions/partially_accepted/small.py": "print(int(input()) * 3 % 33)",
        "submissions/wrong_answer/double.py": "print(2 * int(input()))",
    },
}


def kattis(folder: Path, name: str, **changes: str | None) -> Path:
    """A package; `changes` by path, with None for a file that is left out."""
    for path, text in (KATTIS_FILES[name] | changes).items():
        if text is not None:
            file = folder / name / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(text.encode())
    return folder / name
