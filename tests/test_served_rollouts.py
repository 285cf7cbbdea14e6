"""Dialogs with a model that is a real HTTP server, and the real executor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest

from rlef.chat_server import ChatServer, ServerFault
from rlef.config import FeedbackKind, RolloutConfig, ServerConfig
from rlef.pretrained import model_folder
from rlef.prompts import Dialog, prompt_text, untold_text
from rlef.rollout import collect
from rlef.served_rollouts import collect_served
from rlef.transcripts import Transcript, of_episode
from rlef_sandbox import Executor
from tests.chat_servers import Answer, Served, completion, serving
from tests.test_golden_dialogs import HUMAN_EVAL_PLUS, program
from tests.test_rollout import DOUBLE, PARAMS, PLUS_TWO, SETTINGS, SQUARE, problem, runner


@pytest.fixture(scope="module")
def executor() -> Iterator[Executor]:
    with Executor(workers=1) as executor:
        yield executor


def play(
    executor: Executor, *lines: Sequence[str], feedback: FeedbackKind = "true", turns: int = 3
) -> tuple[list[Transcript], Served]:
    """A dialog for each of `lines`, which the server answers with line after line."""
    statements = {prompt_text(problem(f"double{place}").statement): place for place in range(len(lines))}

    def answer(body: dict, before: int) -> Answer:
        messages = body["messages"]
        return completion(lines[statements[messages[0]["content"]]][len(messages) // 2])

    with serving(answer) as served:
        server = ChatServer(ServerConfig(url=served.url, model="m", retries=0))
        try:
            transcripts = collect_served(
                [problem(f"double{place}") for place in range(len(lines))],
                numbers=range(len(lines)),
                server=server,
                executor=executor,
                settings=SETTINGS,
                params=PARAMS,
                turns=turns,
                feedback=feedback,
            )
        finally:
            server.close()
    return transcripts, served


def last_message(dialog: Dialog, token_ids: list[int]) -> str:
    """Of a user, in what a sampler was given: between the last markers of the two roles."""
    text = dialog.decode(token_ids)
    return text.split("<|user|>")[-1].removesuffix("<|assistant|>")


RIGHT_BODY = "    return sum(numbers) + start\n"
SCRIPTS = ([PLUS_TWO, DOUBLE], [SQUARE], ["no idea", PLUS_TWO, PLUS_TWO], [PLUS_TWO, "no idea", DOUBLE])


@pytest.mark.parametrize("feedback", ["true", "none", "random"])
def test_a_served_model_is_judged_and_told_as_one_of_our_own(
    executor: Executor, feedback: FeedbackKind
) -> None:
    dialog = Dialog.read(model_folder("embedded"), RolloutConfig())
    collection, script = runner(collect, dialog, executor)(*SCRIPTS, feedback=feedback)
    transcripts, served = play(executor, *SCRIPTS, feedback=feedback)
    for found, episode in zip(transcripts, collection.episodes, strict=True):
        twin = of_episode(episode, dialog)
        assert [turn.code for turn in found.turns] == [turn.code for turn in twin.turns]
        assert [turn.outcome for turn in found.turns] == [turn.outcome for turn in twin.turns]
        assert (found.problem_id, found.number, found.solved) == (twin.problem_id, twin.number, twin.solved)
    told = sorted(body["messages"][-1]["content"] for body in served.requests)
    assert told == sorted(last_message(dialog, asked) for asked in script.asked)


def test_the_server_is_sent_the_whole_dialog_so_far(executor: Executor) -> None:
    _, served = play(executor, [PLUS_TWO, DOUBLE], feedback="none")
    assert [message["role"] for message in served.requests[1]["messages"]] == ["user", "assistant", "user"]
    assert served.requests[1]["messages"][1]["content"] == PLUS_TWO
    assert served.requests[1]["messages"][2]["content"] == untold_text()


def test_a_stub_stands_in_the_statement_and_the_answer_holds_it(executor: Executor) -> None:
    given = HUMAN_EVAL_PLUS
    answers = [program(HUMAN_EVAL_PLUS.stub + body) for body in ("    return sum(numbers)", RIGHT_BODY)]
    with serving(lambda body, before: completion(answers[len(body["messages"]) // 2])) as served:
        server = ChatServer(ServerConfig(url=served.url, model="m", retries=0))
        (found,) = collect_served(
            [replace(given, statement="Write it.")],
            numbers=[0],
            server=server,
            executor=executor,
            settings=SETTINGS,
            params=PARAMS,
            turns=2,
            feedback="true",
        )
        server.close()
    first, second = (body["messages"] for body in served.requests)
    assert [message["role"] for message in first] == ["user"]
    assert first[0]["content"] == prompt_text(f"Write it.\n\nBegin your program with this:\n\n{given.stub}")
    assert "- failed: assert add_all([], 1) == 1\nadd_all([], 1) is 0\n" in second[2]["content"]
    assert [turn.outcome for turn in found.turns] == ["wrong_output", "passed"]
    assert found.solved


def test_seeds_differ_between_dialogs_and_turns_and_are_the_same_again(executor: Executor) -> None:
    lines = ([PLUS_TWO] * 3, [PLUS_TWO] * 3)
    seeds = [sorted(body["seed"] for body in play(executor, *lines)[1].requests) for _ in range(2)]
    assert len(set(seeds[0])) == 6
    assert seeds[0] == seeds[1]


def test_the_servers_counts_are_kept(executor: Executor) -> None:
    ((found,), _) = play(executor, [DOUBLE])
    (turn,) = found.turns
    assert (turn.response, turn.prompt_tokens, turn.response_tokens) == (DOUBLE, 11, 5)
    assert turn.seconds > 0


def test_a_fault_of_the_server_is_raised_and_not_scored(executor: Executor) -> None:
    with serving(lambda body, before: Answer("{}", status=503)) as served:
        server = ChatServer(ServerConfig(url=served.url, model="m", retries=0))
        with pytest.raises(ServerFault, match="status 503"):
            collect_served(
                [problem()],
                numbers=[0],
                server=server,
                executor=executor,
                settings=SETTINGS,
                params=PARAMS,
                turns=3,
                feedback="true",
            )
        server.close()
