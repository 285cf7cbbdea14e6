"""How long `rlef problems contamination` takes on sets of the size of CodeContests, and what it finds.

    python bench/contamination.py [--train N] [--eval N]

The problems are drawn from a seed: words and numbers of a skewed distribution, and a sentence about the
input that all statements share. Into the training set go copies of evaluation problems: as they are, with
words around them and one word in forty replaced, with their tests alone, and with a solution alone. The last
line of standard output is JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random

from rlef.config import ExecutorConfig
from rlef.contamination import find_contamination
from rlef.problems import read_jsonl, write_jsonl
from rlef.records import Problem
from rlef_sandbox import Test

COPIES = 10  # of each kind
STATEMENT_WORDS, TESTS, SOLUTIONS, SOLUTION_LINES = 300, 20, 3, 40
SHARED = (
    "the first line of input contains one integer t the number of test cases then the test cases follow each"
)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--train", type=int, default=13_328)
    arguments.add_argument("--eval", type=int, default=165)
    sizes = arguments.parse_args()
    evaluation = list(drawn("eval", sizes.eval, seed=1))
    with tempfile.TemporaryDirectory() as folder:
        train_file, eval_file = Path(folder) / "train.jsonl", Path(folder) / "eval.jsonl"
        write_jsonl(eval_file, iter(evaluation))
        write_jsonl(train_file, with_copies(drawn("train", sizes.train, seed=2), evaluation))
        started = time.process_time()
        found = list(
            find_contamination(
                read_jsonl(train_file, defaults=ExecutorConfig()),
                read_jsonl(eval_file, defaults=ExecutorConfig()),
            )
        )
        figures = {
            "cpu_s": round(time.process_time() - started, 1),
            "train_megabytes": round(train_file.stat().st_size / 1e6),
            "peak_megabytes": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3),
        }
    kinds = Counter(
        (each.train_id.partition(" of ")[0] if " of " in each.train_id else "others", each.evidence)
        for each in found
    )
    print(
        json.dumps(
            figures
            | {
                "train": sizes.train,
                "eval": sizes.eval,
                "copies_of_each_kind": COPIES,
                "found": {f"{copy}: {evidence}": count for (copy, evidence), count in sorted(kinds.items())},
                "hardware": f"{platform.machine()}, 1 thread",
                "python": platform.python_version(),
            }
        )
    )


def drawn(name: str, count: int, *, seed: int) -> Iterator[Problem]:
    random = Random(seed)
    vocabulary = [f"word{number}" for number in range(5000)]
    weights = [1 / (rank + 1) for rank in range(len(vocabulary))]
    for number in range(count):
        words = random.choices(vocabulary, weights, k=STATEMENT_WORDS)
        tests = tuple(
            Test(" ".join(str(random.randrange(10**6)) for _ in range(20)), str(random.randrange(10**6)))
            for _ in range(TESTS)
        )
        yield Problem(
            id=f"{name} {number}",
            statement=f"{' '.join(words)} {SHARED}",
            public_tests=tests[:2],
            private_tests=tests[2:],
            time_limit_s=2.0,
            memory_limit_bytes=1 << 28,
            source="drawn",
            solutions=tuple(program(random) for _ in range(SOLUTIONS)),
        )


def program(random: Random) -> str:
    lines = ["values = list(map(int, input().split()))"]
    for _ in range(SOLUTION_LINES):
        place, factor = random.randrange(20), random.randrange(10**6)
        lines.append(f"values[{place}] = max(values[{place}] * {factor} % 998244353, values[{place} - 1])")
    return "\n".join([*lines, "print(sum(values))", ""])


def with_copies(problems: Iterator[Problem], evaluation: list[Problem]) -> Iterator[Problem]:
    """The first problems with what is an evaluation problem's in the place of their own."""
    for number, problem in enumerate(problems):
        kind, place = divmod(number, COPIES)
        copied = evaluation[number] if kind < 4 else problem
        match kind:
            case 0:
                yield replace(problem, id=f"copy of {place}", statement=copied.statement.upper())
            case 1:
                words = copied.statement.split()
                words[::40] = [f"other{index}" for index in range(len(words[::40]))]
                yield replace(problem, id=f"near copy of {place}", statement=f"Once {' '.join(words)} again.")
            case 2:
                tests = copied.private_tests[::-1] + copied.public_tests
                yield replace(problem, id=f"tests of {place}", private_tests=tests)
            case 3:
                commented = "# by another author\n" + copied.solutions[0]
                yield replace(problem, id=f"solution of {place}", solutions=(commented,))
            case _:
                yield problem


if __name__ == "__main__":
    main()
