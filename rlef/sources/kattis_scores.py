"""Problem packages with scores: whether the full score takes every test.

Groups of tests are graded as the default grader of version `legacy` does it
(https://www.kattis.com/problem-package-format/spec/legacy.html#graders). A test is needed where, if it fails,
the verdict is no longer "accepted", or there are fewer points. Samples become public tests, which have to
pass whatever points they give.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, isclose, isnan
from pathlib import Path
from typing import Any

from rlef.sources.common import Fields, Reason, UnusableProblemError
from rlef.sources.kattis_package import Package, number_of

_DEFAULTS: Fields = {
    "on_reject": "break",
    "grading": "default",
    "grader_flags": "",
    "accept_score": 1,
    "reject_score": 0,
}
_SCORES_OF_LATER_VERSIONS = ("max_score", "score_aggregation", "require_pass", "static_validation_score")
_MODES = ("sum", "avg", "min", "max")
_FLAGS = (*_MODES, "worst_error", "no_errors", "first_error", "ignore_sample")
_LENIENT_FLAGS = ("always_accept", "accept_if_any_accepted")


def require_full_score_is_all_tests(package: Package, settings: Fields) -> None:
    """With the settings of problem.yaml. Raises UnusableProblemError where it is not, or cannot be told."""
    _require_default_grading(package, settings)
    data = package.folder / "data"
    of_root = _settings_of(package, data, _DEFAULTS)
    secret = _graded(package, data / "secret", of_root)
    if "ignore_sample" in _flags_of(of_root):
        whole = secret
    else:
        sample = _graded(package, data / "sample", of_root)
        whole = aggregated([Points(full=sample.full), secret], of_root)
    _require_range(package, data, whole)
    if not whole.takes_all_tests:
        raise _unusable(f"the full score of {whole.full:g} can be had without some of the tests")


@dataclass(frozen=True, slots=True, kw_only=True)
class Points:
    """Of a test or a group."""

    full: float
    most_with_a_failure: float = -inf  # at least what can be had with a test failed; -inf: none that may fail
    accepted_with_a_failure: bool = False  # whether the verdict may be "accepted" then

    @property
    def takes_all_tests(self) -> bool:
        return not self.accepted_with_a_failure or self.most_with_a_failure < self.full


def aggregated(parts: list[Points], settings: Fields) -> Points:
    """Of a group with these parts. More failures give no more points than one: those of a test are never
    below 0, nor more if it fails."""
    flags = _flags_of(settings)
    if not parts:
        return Points(full=0.0)
    mode = next((flag for flag in reversed(flags) if flag in _MODES), "sum")
    full = [part.full for part in parts]
    with_a_failure = []
    for index, part in enumerate(parts):
        if part.most_with_a_failure == -inf:
            continue
        with_a_failure.append(_of_mode(mode, [*full[:index], part.most_with_a_failure, *full[index + 1 :]]))
        if settings["on_reject"] != "continue":  # the others are not judged any more
            with_a_failure.append(_of_mode(mode, [*full[:index], part.most_with_a_failure]))
    return Points(
        full=_of_mode(mode, full),
        most_with_a_failure=max(with_a_failure, default=-inf),
        accepted_with_a_failure=any(part.accepted_with_a_failure for part in parts)
        or any(flag in _LENIENT_FLAGS for flag in flags),
    )


def _graded(package: Package, folder: Path, inherited: Fields) -> Points:
    settings = _settings_of(package, folder, inherited)
    accept, reject = (_number(settings[name], name) for name in ("accept_score", "reject_score"))
    if not 0 <= reject <= accept:
        raise _unusable(f"a test has {accept:g} points if it is accepted, and {reject:g} if not")
    parts = [
        _graded(package, path, settings) if path.is_dir() else Points(full=accept, most_with_a_failure=reject)
        for path in (sorted(folder.iterdir()) if folder.is_dir() else [])
        if path.suffix == ".in" or (path.is_dir() and not path.is_symlink())
    ]
    points = aggregated(parts, settings)
    _require_range(package, folder, points)
    return points


def _of_mode(mode: str, points: list[float]) -> float:
    if mode == "sum":
        return sum(points)
    if mode == "avg":
        return sum(points) / len(points)
    return min(points) if mode == "min" else max(points)


def _settings_of(package: Package, folder: Path, inherited: Fields) -> Fields:
    own = _own_settings(package, folder)
    settings = {name: own.get(name, value) for name, value in inherited.items()}
    if settings["grading"] != "default":
        raise _unusable(f"grading {settings['grading']!r}")
    if settings["on_reject"] not in ("break", "continue"):
        raise _unusable(f"on_reject {settings['on_reject']!r}")
    return settings


def _own_settings(package: Package, folder: Path) -> Fields:
    file = folder / "testdata.yaml"
    return package.yaml(str(file.relative_to(package.folder))) if file.exists() else {}


def _flags_of(settings: Fields) -> list[str]:
    flags = str(settings["grader_flags"] or "").split()
    for flag in flags:
        if flag not in _FLAGS + _LENIENT_FLAGS:
            raise _unusable(f"the default grader has no flag {flag!r}")
    return flags


def _require_range(package: Package, folder: Path, points: Points) -> None:
    """What a group says that it gives at most, all tests must give: else something unknown gives points."""
    given = _own_settings(package, folder).get("range")
    if given is None:
        return
    ends = str(given).split()
    if len(ends) != 2:
        raise UnusableProblemError(Reason.INVALID, f"range {given!r} is not two numbers")
    most = _number(ends[1], "range")
    if most < inf and not isclose(points.full, most):
        place = folder.relative_to(package.folder)
        raise _unusable(f"{place}: all tests give {points.full:g} points, and its range ends at {most:g}")


def _require_default_grading(package: Package, settings: Fields) -> None:
    grading = settings.get("grading") or {}
    if not isinstance(grading, dict):
        raise _unusable(f"grading {grading!r}")
    if grading.get("objective", "max") != "max":
        raise _unusable(f"the objective {grading['objective']!r}")
    if others := sorted(map(str, grading.keys() - {"objective", "show_test_data_groups"})):
        raise _unusable(f"grading says {', '.join(others)}")
    if (package.folder / "graders").exists():
        raise _unusable("graders of its own")
    if settings.get("problem_format_version", "legacy") != "legacy" and package.validators():
        raise _unusable("since version 2023-07 an output validator may give points")
    for name in package.group_settings():
        if said := [key for key in _SCORES_OF_LATER_VERSIONS if key in package.yaml(name)]:
            raise _unusable(f"{name}: {', '.join(said)}")


def _number(value: Any, name: str) -> float:
    number = number_of(value)
    if isnan(number):
        raise UnusableProblemError(Reason.INVALID, f"{name} {value!r} is no number")
    return number


def _unusable(detail: str) -> UnusableProblemError:
    return UnusableProblemError(Reason.UNSUPPORTED, f"scores: {detail}")
