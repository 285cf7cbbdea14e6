"""`rlef problems contamination`: problems to evaluate on that a training set knows already.

A problem's texts are looked up in an index of the evaluation problems, which are few; the training problems
are read one at a time. n-grams are of words without case and punctuation, 13 of them as in GPT-3, and all of
a statement that has fewer (arXiv 2005.14165, appendix C). There one n-gram is enough; but statements of
programming problems share sentences about their input, so here a share of a problem's n-grams must be in one
training problem.
"""

from __future__ import annotations

import ast
import hashlib
import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from rlef.problems import statement_digest
from rlef.records import Problem, text_input
from rlef_sandbox import Test

N_GRAM_WORDS = 13
MIN_WORDS = 8  # a shorter statement is only compared as a whole; of GPT-3, too
MIN_OVERLAP = 0.5  # of an evaluation problem's n-grams
MIN_SHARED_TESTS = 3  # fewer are the same by chance, such as one that maps 1 to 1
MIN_SOLUTION_NODES = 40  # of the syntax tree: a shorter program is a commonplace

Evidence = Literal["statement", "near_statement", "tests", "solution"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that a problem to evaluate on has in common with a training problem."""

    eval_id: str
    train_id: str
    evidence: Evidence
    overlap: float  # of its n-grams, or of its tests; 1.0 where something is equal
    detail: str


def find_contamination(
    train: Iterable[Problem],
    evaluation: Iterable[Problem],
    *,
    words: int = N_GRAM_WORDS,
    min_overlap: float = MIN_OVERLAP,
) -> Iterator[Finding]:
    """By training problem, in their order; of each pair the same statement, or one that is nearly the same;
    all tests of the problem among those of the other; and a solution with the same syntax tree."""
    index = _Index(evaluation, words=words)
    for problem in train:
        yield from index.findings(problem, min_overlap=min_overlap)


class _Index:
    """Where in the evaluation problems each statement, n-gram, test and solution is."""

    def __init__(self, problems: Iterable[Problem], *, words: int) -> None:
        self._words = words
        self._ids: list[str] = []
        self._statements: dict[bytes, list[int]] = defaultdict(list)
        self._grams: dict[int, dict[bytes, list[int]]] = {}  # by their words: a short statement is one n-gram
        self._tests: dict[bytes, list[int]] = defaultdict(list)
        self._solutions: dict[bytes, list[int]] = defaultdict(list)
        self._num_grams: list[int] = []  # of each problem
        self._num_tests: list[int] = []
        for place, problem in enumerate(problems):
            self._add(place, problem)

    def _add(self, place: int, problem: Problem) -> None:
        self._ids.append(problem.id)
        self._statements[statement_digest(problem)].append(place)
        words = _words_of(problem.statement)
        length = min(self._words, len(words))
        grams = _grams_of(words, length)
        self._num_grams.append(len(grams))
        of_length = self._grams.setdefault(length, defaultdict(list))
        for gram in grams:
            of_length[gram].append(place)
        tests = _tests_of(problem)
        self._num_tests.append(len(tests))
        for test in tests:
            self._tests[test].append(place)
        for solution in _solutions_of(problem):
            self._solutions[solution].append(place)

    def findings(self, problem: Problem, *, min_overlap: float) -> Iterator[Finding]:
        equal = set(self._statements.get(statement_digest(problem), ()))
        for place in sorted(equal):
            yield self._finding(place, problem, "statement", 1.0, "the same but for case and blanks")
        for place, shared in sorted(self._shared_grams(problem).items()):
            overlap = shared / self._num_grams[place]
            if place not in equal and overlap >= min_overlap:
                detail = f"{shared} of its {self._num_grams[place]} n-grams"
                yield self._finding(place, problem, "near_statement", overlap, detail)
        for place, shared in sorted(_shared(self._tests, _tests_of(problem)).items()):
            if shared == self._num_tests[place] >= MIN_SHARED_TESTS:
                yield self._finding(place, problem, "tests", 1.0, f"all of its {shared} tests")
        solutions = _solutions_of(problem) if self._solutions else set()
        for place in sorted(_shared(self._solutions, solutions)):
            yield self._finding(place, problem, "solution", 1.0, "one with the same syntax tree")

    def _shared_grams(self, problem: Problem) -> dict[int, int]:
        words = _words_of(problem.statement)
        found: dict[int, int] = {}
        for length, of_length in self._grams.items():
            found |= _shared(of_length, _grams_of(words, length))  # no problem is in two of them
        return found

    def _finding(
        self, place: int, problem: Problem, evidence: Evidence, overlap: float, detail: str
    ) -> Finding:
        return Finding(
            eval_id=self._ids[place],
            train_id=problem.id,
            evidence=evidence,
            overlap=overlap,
            detail=detail,
        )


def _shared(index: dict[bytes, list[int]], keys: set[bytes]) -> dict[int, int]:
    """How many of the keys each place has that has any."""
    counts: dict[int, int] = defaultdict(int)
    for key in keys:
        for place in index.get(key, ()):
            counts[place] += 1
    return counts


def _words_of(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _grams_of(words: list[str], length: int) -> set[bytes]:
    """Joined by blanks; none of a statement that is too short."""
    if length < MIN_WORDS:
        return set()
    return {" ".join(words[start : start + length]).encode() for start in range(len(words) - length + 1)}


def _tests_of(problem: Problem) -> set[bytes]:
    """Digests, without regard to blanks where programs read and write text."""
    return {
        _digest(
            repr((text_input(test).split(), test.expected_output.split()))
            if isinstance(test, Test)
            else repr(test)
        )
        for test in (*problem.public_tests, *problem.private_tests)
    }


def _solutions_of(problem: Problem) -> set[bytes]:
    """Digests of the syntax trees of those that are Python, and no commonplace."""
    found: set[bytes] = set()
    for program in problem.solutions:
        try:
            with warnings.catch_warnings(action="ignore"):
                tree = ast.parse(program)
            if sum(1 for _ in ast.walk(tree)) >= MIN_SOLUTION_NODES:
                found.add(_digest(ast.dump(tree)))
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
    return found


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
