"""Whole dialogs as text, of each dialect and each way to fail: tests/golden/ is to be read as documentation.

To write the files anew after a change that is meant, delete them and run this file twice.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from rlef.pretrained import model_folder
from rlef.prompts import Dialog
from rlef.records import Episode, Problem
from rlef.rollout import Collection, collect
from rlef.streaming import collect_overlapped
from rlef_sandbox import Executor, Test
from tests.test_rollout import PARAMS, SETTINGS, Script

GOLDEN = Path(__file__).parent / "golden"

CODE_CONTESTS = Problem(
    id="double",
    statement="Print the double of the number.",
    public_tests=(Test("2\n", "4\n"), Test("0\n", "0\n")),
    private_tests=(Test("3\n", "6\n"),),
    time_limit_s=0.5,
    memory_limit_bytes=1 << 27,
    source="code_contests",
)


def program(text: str) -> str:
    return f"```python\n{text}\n```"


CODE_CONTESTS_RESPONSES = [
    program("print(int(input()) + 2)"),
    program("def double(number):\n    raise ValueError(number)\n\n\ndouble(int(input()))"),
    program("while True:\n    pass"),
    program("numbers = list(range(10**8))"),
    program("print('0' * (1 << 25))"),
    program("print(2 *"),
    "Twice the number is what is wanted.",
    program("print(2 * int(input()))"),
]


@pytest.fixture(scope="module")
def executor() -> Iterator[Executor]:
    with Executor(workers=2) as executor:
        yield executor


def as_text(episode: Episode, dialog: Dialog) -> str:
    """What the model reads, with what it wrote, between the names of the two roles. Marks below a line of a
    traceback are left out: each version of Python sets them otherwise."""
    text = dialog.decode(episode.token_ids).replace("<|user|>", "\n[user]\n")
    text = text.replace("<|assistant|>", "\n[assistant]\n").lstrip("\n")
    return re.sub(r"^ *[~^]+\n", "", text, flags=re.MULTILINE) + "\n"


@pytest.mark.parametrize("collector", [collect, collect_overlapped], ids=["in_lockstep", "overlapped"])
@pytest.mark.parametrize(
    ("name", "problem", "responses"), [("code_contests", CODE_CONTESTS, CODE_CONTESTS_RESPONSES)]
)
def test_a_dialog_is_word_by_word_what_its_golden_file_says(
    executor: Executor,
    collector: Callable[..., Collection],
    name: str,
    problem: Problem,
    responses: Sequence[str],
) -> None:
    dialog = Dialog.read(model_folder("embedded"), SETTINGS)
    (episode,) = collector(
        [problem],
        numbers=[0],
        sampler=Script(dialog, responses),
        executor=executor,
        dialog=dialog,
        settings=SETTINGS,
        params=PARAMS,
        turns=len(responses),
        feedback="true",
    ).episodes
    golden, text = GOLDEN / f"{name}.txt", as_text(episode, dialog)
    if not golden.exists():
        golden.write_text(text, encoding="utf-8")
        pytest.fail(f"{golden} was not there; it is now")
    assert text == golden.read_text(encoding="utf-8")
