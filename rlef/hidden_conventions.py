"""The embedded problem source: tasks whose statement leaves conventions open that only the tests fix.

A *task* is a family of statements about a short line of integers ("print the numbers sorted"). Its *axes* are
the conventions that the statement does not mention (ascending or descending, which separator, counting from 0
or 1 ...). One choice on every axis is a *reading*. Every task has at least `MINIMUM_READINGS` of them and all
are consistent with the statement, so three blind guesses solve at most a quarter of the problems; the public
test's expected output tells every two readings apart, so a policy that uses execution feedback can know the
right one.

Held-out problems differ from training problems in their (task, reading) pairs and in their wordings.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from random import Random
from types import CodeType

from rlef.records import Problem
from rlef_sandbox import Test

MINIMUM_READINGS = 12
PRIVATE_TESTS = 5
SPLITS = ("train", "heldout")

_TIME_LIMIT_S = 5.0
_MEMORY_LIMIT_BYTES = 256 * 1024 * 1024
_HELDOUT_SHARE = 0.25  # of a task's readings
_WORDINGS_PER_HELDOUT = 4  # every fourth wording is held out

READ_NUMBERS = "a = list(map(int, input().split()))\n"
_FRAMES = (
    "{Verb} {thing}.",
    "Given a line of integers, {verb} {thing}.",
    "Read the integers and {verb} {thing}.",
    "Please {verb} {thing}.",
    "Your program should {verb} {thing}.",
    "The input is a line of integers. {Verb} {thing}.",
)
_VERBS = ("print", "output", "write", "show")


@dataclass(frozen=True, slots=True)
class Axis:
    """One convention that the statement leaves open, and the program text of each choice."""

    name: str
    choices: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Task:
    """`body` is the program after the line is read, with `{axis name}` where a convention enters."""

    name: str
    things: tuple[str, ...]  # ways to say what to print
    body: str
    axes: tuple[Axis, ...]

    def readings(self) -> tuple[tuple[str, ...], ...]:
        """Every choice of one fragment per axis, in a fixed order."""
        return tuple(itertools.product(*(axis.choices for axis in self.axes)))

    def program(self, reading: tuple[str, ...]) -> str:
        names = (axis.name for axis in self.axes)
        return READ_NUMBERS + self.body.format(**dict(zip(names, reading, strict=True))) + "\n"


def _quoted(name: str, choices: Sequence[str]) -> Axis:
    return Axis(name, tuple(map(repr, choices)))


# The same dozen in every task: with fewer, a policy can learn by heart which of them go with a task.
_SEPARATOR = _quoted("separator", " ,-:/+;|*=_#")
_LABEL = _quoted(
    "label", ["sum", "total", "all", "value", "answer", "result", "out", "at", "top", "best", "most", "index"]
)
_MARK = _quoted("label", "x-.?!*#+=_~&")


TASKS = (
    Task(
        "sort",
        ("the numbers sorted", "the sorted list", "the numbers in order"),
        "print(*sorted(a){order}, sep={separator})",
        (Axis("order", ("", "[::-1]")), _SEPARATOR),
    ),
    Task(
        "backwards",
        ("the numbers backwards", "the list from back to front", "the numbers in reverse"),
        "print(*a[::-1], sep={separator})",
        (_SEPARATOR,),
    ),
    Task(
        "distinct",
        ("the distinct numbers", "each number once", "the numbers without repeats"),
        "print(*{order}, sep={separator})",
        (
            Axis("order", ("dict.fromkeys(a)", "sorted(set(a))", "sorted(set(a))[::-1]")),
            _SEPARATOR,
        ),
    ),
    Task(
        "extremes",
        ("the smallest and largest number", "both extremes", "the two extreme numbers"),
        "print({order}, sep={separator})",
        (Axis("order", ("min(a), max(a)", "max(a), min(a)")), _SEPARATOR),
    ),
    Task(
        "total",
        ("the sum with its label", "the labelled sum", "the sum of the numbers and a label"),
        "print(*[{label}, sum(a)]{order}, sep=':')",
        (_LABEL, Axis("order", ("", "[::-1]"))),
    ),
    Task(
        "largest",
        ("the largest number with its label", "the labelled maximum", "the maximum and a label"),
        "print(*[{label}, max(a)]{order}, sep='=')",
        (_LABEL, Axis("order", ("", "[::-1]"))),
    ),
    Task(
        "position",
        ("where the largest number is", "the place of the maximum", "the position of the largest number"),
        "print({label}, a.index(max(a)){base}, sep=':')",
        (_LABEL, Axis("base", ("", " + 1"))),
    ),
    Task(
        "above",
        ("the numbers above the first", "the numbers over the first one", "the numbers beyond the first"),
        "print(*[x for x in a if x {comparison} a[0]], sep={separator})",
        (Axis("comparison", (">", ">=")), _SEPARATOR),
    ),
    Task(
        "running",
        ("the running sums", "the sum so far at each number", "the running sum of the numbers"),
        "print(*[sum(a[:{bound}]) for i in range(len(a))], sep={separator})",
        (Axis("bound", ("i", "i + 1")), _SEPARATOR),
    ),
    Task(
        "halves",
        ("half of each number", "the halves of the numbers", "each number divided by two"),
        "print(*[{rounding} for x in a], sep={separator})",
        (Axis("rounding", ("x // 2", "(x + 1) // 2", "round(x / 2)")), _SEPARATOR),
    ),
    Task(
        "differences",
        ("the differences of neighbours", "how neighbours differ", "the difference of each two neighbours"),
        "print(*[{difference} for x, y in zip(a, a[1:])], sep={separator})",
        (Axis("difference", ("y - x", "x - y", "abs(x - y)")), _SEPARATOR),
    ),
    Task(
        "rotate",
        ("the list rotated by two", "the numbers rotated two places", "the numbers moved round by two"),
        "print(*{direction}, sep={separator})",
        (Axis("direction", ("a[2:] + a[:2]", "a[-2:] + a[:-2]")), _SEPARATOR),
    ),
    Task(
        "none_over",
        (
            "the numbers over seven or a mark",
            "the numbers over seven or the empty mark",
            "all over seven or a mark",
        ),
        "print(*[x for x in a if x > 7] or [{label}]{times})",
        (_MARK, Axis("times", ("", " * len(a)"))),
    ),
    Task(
        "alternate",
        ("every other number", "every second number", "the numbers skipping every other one"),
        "print(*a[{start}::2], sep={separator})",
        (Axis("start", ("", "1")), _SEPARATOR),
    ),
    Task(
        "parity",
        ("the numbers grouped by parity", "even and odd numbers apart", "the numbers split by parity"),
        "print(*sorted(a, key=lambda x: {key}), sep={separator})",
        (Axis("key", ("x % 2", "-(x % 2)")), _SEPARATOR),
    ),
    Task(
        "frequent",
        ("the most frequent number with its label", "the labelled mode", "the mode and a label"),
        "print({label}, max({ties}, key=a.count), sep=':')",
        (_LABEL, Axis("ties", ("sorted(a)", "sorted(a)[::-1]"))),
    ),
)

_TASK_BY_NAME = {task.name: task for task in TASKS}


@cache
def split_readings(task_name: str) -> dict[str, tuple[tuple[str, ...], ...]]:
    """The readings of each split. On a task with several axes every choice of an axis stays in training."""
    task = _TASK_BY_NAME[task_name]
    readings = task.readings()
    train = set(readings)
    heldout: list[tuple[str, ...]] = []
    for reading in sorted(readings, key=lambda reading: _digest(task.name, *reading)):
        if len(heldout) >= _HELDOUT_SHARE * len(readings):
            break
        rest = train - {reading}
        if len(task.axes) == 1 or all(
            any(other[axis] == choice for other in rest) for axis, choice in enumerate(reading)
        ):
            train.remove(reading)
            heldout.append(reading)
    return {
        "train": tuple(reading for reading in readings if reading in train),
        "heldout": tuple(reading for reading in readings if reading not in train),
    }


@cache
def split_wordings(task_name: str) -> dict[str, tuple[str, ...]]:
    """The statements of each split: no held-out statement is ever seen in training."""
    task = _TASK_BY_NAME[task_name]
    wordings: dict[str, list[str]] = {"train": [], "heldout": []}
    parts = itertools.product(enumerate(_FRAMES), enumerate(_VERBS), enumerate(task.things))
    for (frame_index, frame), (verb_index, verb), (thing_index, thing) in parts:
        is_heldout = (frame_index + verb_index + thing_index) % _WORDINGS_PER_HELDOUT == 0
        sentence = frame.format(verb=verb, Verb=verb.capitalize(), thing=thing)
        wordings["heldout" if is_heldout else "train"].append(sentence)
    return {split: tuple(sentences) for split, sentences in wordings.items()}


def generate(split: str, *, seed: int, size: int) -> Iterator[Problem]:
    """`size` problems of a split, a function of the seed alone."""
    for index in range(size):
        yield problem(split, seed=seed, index=index)


def problem(split: str, *, seed: int, index: int) -> Problem:
    """Problem number `index` of a split. Tasks take turns, the rest is drawn."""
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is not one of {', '.join(SPLITS)}")
    random = Random(_digest("problem", split, str(seed), str(index)))
    task = TASKS[index % len(TASKS)]
    reading = random.choice(split_readings(task.name)[split])
    others = [other for other in task.readings() if other != reading]
    return Problem(
        id=f"hidden-conventions/{split}/{seed}/{index}/{task.name}",
        statement=random.choice(split_wordings(task.name)[split]),
        public_tests=(_test(task.program(reading), _telling_input(task, random)),),
        private_tests=tuple(_test(task.program(reading), _draw_input(random)) for _ in range(PRIVATE_TESTS)),
        time_limit_s=_TIME_LIMIT_S,
        memory_limit_bytes=_MEMORY_LIMIT_BYTES,
        source="hidden_conventions",
        solutions=(task.program(reading),),
        incorrect_solutions=(task.program(others[_number("incorrect", split, seed, index) % len(others)]),),
    )


def task_of(problem: Problem) -> Task:
    """The task behind one of this source's problems."""
    return _TASK_BY_NAME[problem.id.rsplit("/", 1)[1]]


def run_reference(program: str, test_input: str) -> str:
    """Standard output of one of *our own* generated programs, run in this process.

    Never for a program that a model wrote: those go to the sandbox.
    """
    output = io.StringIO()
    previous = sys.stdin
    sys.stdin = io.StringIO(test_input)
    try:
        with contextlib.redirect_stdout(output):
            exec(_compiled(program), {"__name__": "__main__"})  # noqa: S102
    finally:
        sys.stdin = previous
    return output.getvalue()


def _telling_input(task: Task, random: Random) -> str:
    """An input on which no two readings of the task print the same."""
    programs = [task.program(reading) for reading in task.readings()]
    while True:
        test_input = _draw_input(random)
        if task.name == "none_over" and any(int(number) > 7 for number in test_input.split()):
            continue  # the mark shows only where nothing is left to print
        if len({run_reference(program, test_input) for program in programs}) == len(programs):
            return test_input


def _draw_input(random: Random) -> str:
    numbers = [random.randint(0, 9) for _ in range(random.randint(4, 6))]
    return " ".join(map(str, numbers)) + "\n"


def _test(program: str, test_input: str) -> Test:
    return Test(test_input, run_reference(program, test_input))


@cache
def _compiled(program: str) -> CodeType:
    return compile(program, "reference.py", "exec")


def _number(*parts: object) -> int:
    return int(_digest(*map(str, parts)), base=16)


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
