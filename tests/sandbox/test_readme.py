"""The library's README says what is so."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests.sandbox.catalogue import THEMES

REPOSITORY = Path(__file__).parents[2]


def test_example_prints_what_it_says():
    [example] = re.findall(r"```python\n(.*?)```", (REPOSITORY / "sandbox/README.md").read_text(), re.DOTALL)
    promised = [line.removeprefix("# ") for line in example.splitlines() if line.startswith("# ")]

    done = subprocess.run(
        [sys.executable, "-c", example], capture_output=True, text=True, timeout=60, check=True
    )

    assert done.stdout.splitlines() == promised
    assert len(example.splitlines()) <= 10


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
