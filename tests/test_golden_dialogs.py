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
from rlef.records import Assertion, Episode, Expression, Problem
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
    time_limit_s=1.5,
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


HEAD = 'def add_all(numbers, start):\n    """Add the numbers to start."""\n'
HUMAN_EVAL_PLUS = Problem(
    id="HumanEval/900",
    statement=f"Write the whole function, its head included:\n\n{HEAD}",
    public_tests=(Expression("add_all([], 1)", "1"), Expression("add_all([2, 3], 4)", "9")),
    private_tests=(Expression("add_all([7], 0)", "7"),),
    time_limit_s=1.5,
    memory_limit_bytes=1 << 27,
    source="human_eval_plus",
    function="add_all",
    dialect="evalplus",
    stub=HEAD,
)
HUMAN_EVAL_PLUS_RESPONSES = [
    "    return sum(numbers)\n```",
    "    if numbers:\n        raise ValueError(start)\n    return start\n```",
    "    while numbers:\n        pass\n    return start\n```",
    "    return len(list(range(10**8)))\n```",
    "    exit()\n```",
    "    return start +\n```",
    "I do not know.",
    "    return sum(numbers) + start\n```",
]

MBPP_PLUS = Problem(
    id="Mbpp/2",
    statement="Write a function to find the shared elements of two lists.\n"
    "assert set(shared((3, 4), (4, 5))) == set((4,))\n\nThe function's name is `shared`.\n",
    public_tests=(
        Assertion("assert set(shared((3, 4), (4, 5))) == set((4,))"),
        Assertion("assert shared((1, 2), ()) in ((), [])"),
        Assertion(
            "for n in range(3):\n    first = (n, n + 1)\n    assert n < len(shared(first, first)) + n < 9"
        ),
    ),
    private_tests=(Assertion("assert set(shared((1, 2), (2, 1))) == {1, 2}"),),
    time_limit_s=1.5,
    memory_limit_bytes=1 << 27,
    source="mbpp_plus",
    dialect="evalplus",
)
MBPP_PLUS_RESPONSES = [
    program("def shared(one, two):\n    return [n for n in one if n not in two]"),
    program("def shared(one, two):\n    1 / one[0]\n    return tuple(n for n in one if n in two)"),
    program("def shared(one, two):\n    assert two, 'empty'\n    return one[:1]"),
    program("def shared(one, two):\n    while two:\n        pass\n    return ()"),
    program("def shared(one, two):\n    return list(range(10**8)) if two else ()"),
    program("def common(one, two):\n    return one"),
    "There is none.",
    program("def shared(one, two):\n    return tuple(n for n in one if n in two)"),
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
    ("name", "problem", "responses"),
    [
        ("code_contests", CODE_CONTESTS, CODE_CONTESTS_RESPONSES),
        ("human_eval_plus", HUMAN_EVAL_PLUS, HUMAN_EVAL_PLUS_RESPONSES),
        ("mbpp_plus", MBPP_PLUS, MBPP_PLUS_RESPONSES),
    ],
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
    sampled = [token for token, is_own in zip(episode.token_ids, episode.sampled, strict=True) if is_own]
    assert sampled == [token for text in responses for token in dialog.response(text)]
    golden, text = GOLDEN / f"{name}.txt", as_text(episode, dialog)
    if not golden.exists():
        golden.write_text(text, encoding="utf-8")
        pytest.fail(f"{golden} was not there; it is now")
    assert text == golden.read_text(encoding="utf-8")
