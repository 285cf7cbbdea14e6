from __future__ import annotations

import re
from pathlib import Path

import rlef_kernels

README = Path(__file__).parents[2] / "kernels" / "README.md"


def test_the_example_does_what_its_last_comment_says() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    names: dict[str, object] = {}
    exec(example, names)
    gradient = names["logits"].grad  # type: ignore[attr-defined]
    assert gradient[0, 0] < 0 < gradient[1, 1]
    assert not gradient[2].any()


def test_the_table_names_every_public_function() -> None:
    functions = {name for name in rlef_kernels.__all__ if name.islower()}
    named = {
        name
        for row in re.findall(r"^\|(.*?)\|", README.read_text(encoding="utf-8"), re.MULTILINE)
        for name in re.findall(r"`(\w+)`", row)
    }
    assert named == functions
