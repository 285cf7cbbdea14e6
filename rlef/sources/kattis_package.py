"""The files of a problem package, as `kattis.py` reads them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlef.config import ConfigError
from rlef.sources.common import Fields, Reason, UnusableProblemError
from rlef_sandbox import Test

MOST_YAML_BYTES = 1 << 20


class Package:
    """A package's files, none of which may lie outside its folder or be larger than a test."""

    def __init__(self, folder: Path, most_bytes: int) -> None:
        self.folder = folder
        self._root = folder.resolve()
        self._most_bytes = most_bytes

    def text(self, path: Path) -> str:
        name = path.relative_to(self.folder)
        if not path.resolve().is_relative_to(self._root) or not path.is_file():
            raise UnusableProblemError(Reason.INVALID, f"{name} is no file of the package")
        size = path.stat().st_size
        if size > self._most_bytes:
            raise UnusableProblemError(
                Reason.TOO_LARGE, f"{name} has {size:,} bytes, more than {self._most_bytes:,}"
            )
        try:
            return path.read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise UnusableProblemError(Reason.UNREADABLE, f"{name} is not UTF-8 ({error.reason})") from None

    def optional_text(self, name: str) -> str | None:
        """None where there is no such file."""
        return self.text(self.folder / name) if (self.folder / name).exists() else None

    def yaml(self, name: str) -> Fields:
        try:
            import yaml
        except ImportError:
            raise ConfigError(f"{self.folder}: packages want PyYAML; pip install 'rlef[data]'") from None
        text = self.text(self.folder / name)
        if len(text) > MOST_YAML_BYTES:
            raise UnusableProblemError(Reason.TOO_LARGE, f"{name} has {len(text):,} characters")
        try:
            settings = yaml.safe_load(text)
        except (yaml.YAMLError, RecursionError, ValueError) as error:
            said = str(error).replace("\n", " ")[:200]
            raise UnusableProblemError(Reason.UNREADABLE, f"{name} is not YAML ({said})") from None
        if not isinstance(settings or {}, dict):
            raise UnusableProblemError(Reason.INVALID, f"{name} holds no map")
        return settings or {}

    def tests(self, group: str) -> list[Test]:
        """In the order of their names, those of groups inside included."""
        tests = []
        for path in sorted((self.folder / "data" / group).rglob("*.in")):
            answer = path.with_suffix(".ans")
            if not answer.is_file():
                name = path.relative_to(self.folder)
                raise UnusableProblemError(Reason.INVALID, f"{name} has no {answer.name}")
            tests.append(Test(self.text(path), self.text(answer)))
        return tests

    def statement(self) -> str:
        """In English, as it stands, in LaTeX or Markdown."""
        for folder in ("problem_statement", "statement"):
            for name in ("problem.en.md", "problem.md", "problem.en.tex", "problem.tex"):
                if (text := self.optional_text(f"{folder}/{name}")) is not None:
                    return text
        raise UnusableProblemError(Reason.UNSUPPORTED, "no statement in English as LaTeX or Markdown")

    def submissions(self, kind: str) -> list[str]:
        return [self.text(path) for path in sorted((self.folder / "submissions" / kind).glob("*.py"))]

    def validators(self) -> list[Path]:
        """The programs of its output validators: files, or folders."""
        folders = [self.folder / name for name in ("output_validators", "output_validator")]
        entries = [entry for folder in folders if folder.is_dir() for entry in sorted(folder.iterdir())]
        inside = [sorted(entry.iterdir()) if entry.is_dir() else [entry] for entry in entries]
        return [path for paths in inside for path in paths if not path.name.startswith(".")]

    def group_settings(self) -> Iterator[str]:
        for name in ("testdata.yaml", "test_group.yaml"):
            for path in sorted((self.folder / "data").rglob(name)):
                yield str(path.relative_to(self.folder))


def number_of(value: Any) -> float:
    """NaN, which is in no range, where it is none."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan
