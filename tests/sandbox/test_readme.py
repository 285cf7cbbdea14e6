"""The library's README says what is so."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.sandbox.catalogue import THEMES

REPOSITORY = Path(__file__).parents[2]


EXAMPLES = re.findall(r"```python\n(.*?)```", (REPOSITORY / "sandbox/README.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES)
def test_example_prints_what_it_says(example):
    promised = [line.removeprefix("# ") for line in example.splitlines() if line.startswith("# ")]

    done = subprocess.run(
        [sys.executable, "-c", example], capture_output=True, text=True, timeout=60, check=True
    )

    assert done.stdout.splitlines() == promised


def test_the_first_example_is_short():
    assert len(EXAMPLES[0].splitlines()) <= 10


def test_security_names_every_theme_of_the_catalogue():
    named = re.findall(r"\[(\w+)\]", (REPOSITORY / "SECURITY.md").read_text())

    assert set(named) == set(THEMES)


def test_every_test_that_security_names_exists():
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    named = re.findall(
        r"`(test_\w+?)(\.\.\.|_\.\.\.)?(?:\[.*?\])?`", (REPOSITORY / "SECURITY.md").read_text()
    )

    assert len(named) > 10
    for name, _ in named:
        assert f"def {name}" in tests, name
