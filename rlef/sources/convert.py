"""`rlef problems convert`: published files into our JSONL, one by one, and what is left out and why."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rlef.config import ConfigError
from rlef.files import replacing
from rlef.problems import MAX_TESTS_PER_PROBLEM_BYTES, line_of, problem_of, read_jsonl, statement_digest
from rlef.records import Problem
from rlef.sources import apps, code_contests, codeio, evalplus, human_eval, kattis, live_code_bench, verl
from rlef.sources.common import Choices, Found, Maker, Reason, SetAside, problems_in
from rlef_sandbox import Executor

Reader = Callable[[Path, Choices, Executor | None], Iterator[Found | SetAside]]


def _of_rows(maker: Maker) -> Reader:
    return lambda path, choices, executor: problems_in(path, maker, choices, executor)


FORMATS: dict[str, Reader] = {
    "codecontests": _of_rows(code_contests.problem_of_row),
    "humaneval": _of_rows(human_eval.problem_of_row),
    "humanevalplus": _of_rows(evalplus.problem_of_row),
    "mbppplus": _of_rows(evalplus.problem_of_row),
    "livecodebench": _of_rows(live_code_bench.problem_of_row),
    "apps": _of_rows(apps.problem_of_row),
    "taco": _of_rows(apps.problem_of_row),
    "kattis": kattis.problems,
    "verl": _of_rows(verl.problem_of_row),
    "codeio": _of_rows(codeio.problem_of_row),
}
USES_SANDBOX = frozenset({"humanevalplus", "mbppplus", "codeio", "kattis"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Duplicate:
    """A problem whose statement is that of another, but for case and blanks."""

    id: str
    of: str
    file: str  # where the other is


@dataclass(slots=True, kw_only=True)
class Conversion:
    """What came of the files."""

    written: int = 0
    flagged: Counter[str] = field(default_factory=Counter)
    set_aside: list[SetAside] = field(default_factory=list)
    duplicates: list[Duplicate] = field(default_factory=list)

    def lines(self) -> Iterator[str]:
        """For a reader: counts, and the first of each kind by name."""
        yield f"{self.written:>7}  problems written"
        for flag, count in sorted(self.flagged.items()):
            yield f"{count:>7}  of them flagged: {flag}"
        if self.duplicates:
            yield f"{len(self.duplicates):>7}  with the statement of another: " + _some(
                [f"{each.id} = {each.of} in {each.file}" for each in self.duplicates]
            )
        for reason in Reason:
            of_reason = [each for each in self.set_aside if each.reason is reason]
            if of_reason:
                yield f"{len(of_reason):>7}  set aside, {reason}: " + _some(
                    [f"{each.id or each.place} ({each.detail})" for each in of_reason]
                )

    def as_json(self) -> dict[str, Any]:
        return {
            "written": self.written,
            "flagged": dict(self.flagged),
            "set_aside": [
                {"place": each.place, "id": each.id, "reason": each.reason, "detail": each.detail}
                for each in self.set_aside
            ],
            "duplicates": [{"id": each.id, "of": each.of, "file": each.file} for each in self.duplicates],
        }


def _some(items: list[str]) -> str:
    """The first three: the report has all."""
    return "; ".join(items[:3]) + (" ..." if len(items) > 3 else "")


def convert(
    format_name: str,
    inputs: Sequence[Path],
    output: Path,
    *,
    choices: Choices,
    against: Sequence[Path] = (),
    drop_duplicates: bool = False,
    executor: Executor | None = None,
) -> Conversion:
    """Write the usable problems of `inputs` to `output`, which is whole or not there.

    A problem that cannot be used is set aside and told of; it never ends the conversion. An `id` that comes
    twice gets a number.

    Raises:
        ConfigError: a file is missing or broken as a whole, or no problem is usable.
    """
    for path in inputs:
        if not path.exists():
            raise ConfigError(f"{path}: there is no such file; name what was downloaded")
    made = Conversion()
    others = _Statements()
    for path in against:
        for problem in read_jsonl(path, defaults=choices.defaults, max_test_bytes=choices.max_test_bytes):
            others.add(problem, str(path))
    own, ids = _Statements(), Counter[str]()
    with replacing(output) as writing, writing.open("w", encoding="utf-8") as file:
        for outcome in _outcomes(format_name, inputs, choices, executor):
            checked = _checked(outcome, choices) if isinstance(outcome, Found) else outcome
            if isinstance(checked, SetAside):
                made.set_aside.append(checked)
                continue
            problem, line = checked
            twins = [twin for twin in (others.twin_of(problem), own.twin_of(problem)) if twin]
            made.duplicates += twins
            if twins and drop_duplicates:
                made.set_aside.append(
                    SetAside(
                        place=outcome.place,
                        id=problem.id,
                        reason=Reason.DUPLICATE,
                        detail=f"the statement of {twins[0].of!r} in {twins[0].file}",
                    )
                )
                continue
            own.add(problem, "this file")
            ids[problem.id] += 1
            if ids[problem.id] > 1:
                line = line_of(replace(problem, id=f"{problem.id}~{ids[problem.id]}"))
            file.write(line)
            made.written += 1
            made.flagged.update(problem.flags)
        if not made.written:
            raise ConfigError(_nothing_written(format_name, inputs, made))
    return made


def _nothing_written(format_name: str, inputs: Sequence[Path], made: Conversion) -> str:
    files = ", ".join(str(path) for path in inputs)
    if not made.set_aside:
        return f"{files}: no problem in it; give files of {format_name} with some"
    first = made.set_aside[0]
    return (
        f"{files}: none of {len(made.set_aside)} problems can be used as {format_name}; the first is set "
        f"aside, {first.reason}: {first.place} ({first.detail}); see whether it is of another format"
    )


def _outcomes(
    format_name: str, inputs: Sequence[Path], choices: Choices, executor: Executor | None
) -> Iterator[Found | SetAside]:
    for path in inputs:
        yield from FORMATS[format_name](path, choices, executor)


def _checked(found: Found, choices: Choices) -> tuple[Problem, str] | SetAside:
    """The problem and its line, if the line reads back as a problem that can be judged."""
    place, problem = found.place, found.problem
    try:
        line = line_of(problem)
        if (size := len(line.encode())) > choices.max_test_bytes * MAX_TESTS_PER_PROBLEM_BYTES:
            detail = f"a line of {size:,} bytes"
            return SetAside(place=place, id=problem.id, reason=Reason.TOO_LARGE, detail=detail)
        again = problem_of(
            json.loads(line), place, defaults=choices.defaults, max_test_bytes=choices.max_test_bytes
        )
    except UnicodeEncodeError as error:
        return SetAside(place=place, id=problem.id, reason=Reason.UNREADABLE, detail=str(error.reason))
    except (ConfigError, RecursionError, ValueError) as error:
        detail = str(error).removeprefix(f"{place}: ")
        reason = Reason.TOO_LARGE if "problems.max_test_bytes" in detail else Reason.INVALID
        return SetAside(place=place, id=problem.id, reason=reason, detail=detail)
    return again, line


class _Statements:
    """Which problem has which statement, by a digest of its words."""

    def __init__(self) -> None:
        self._of_digest: dict[bytes, tuple[str, str]] = {}

    def add(self, problem: Problem, file: str) -> None:
        self._of_digest.setdefault(statement_digest(problem), (problem.id, file))

    def twin_of(self, problem: Problem) -> Duplicate | None:
        if twin := self._of_digest.get(statement_digest(problem)):
            return Duplicate(id=problem.id, of=twin[0], file=twin[1])
        return None
