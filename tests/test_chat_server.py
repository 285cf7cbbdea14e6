from __future__ import annotations

import time
from collections.abc import Sequence

import pytest

from rlef.chat_server import ChatMessage, ChatServer, Reply, ServerFault, check_server
from rlef.config import ConfigError, ServerConfig
from rlef.ports import SamplingParams
from tests.chat_servers import Answer, Served, completion, serving

PARAMS = SamplingParams(temperature=0.2, top_p=0.95, max_tokens=7, seed=1)
NO_PAUSE = {"Retry-After-Ms": "1"}
BUSY = Answer('{"error": "busy"}', status=429, headers=NO_PAUSE)
BROKEN = Answer('{"error": "broken"}', status=500, headers=NO_PAUSE)


def ask(
    served: Served | str,
    *texts: str,
    retries: int = 0,
    timeout_s: float = 60.0,
    concurrency: int = 4,
    api_key_env: str = "",
) -> list[Reply]:
    settings = ServerConfig(
        url=served if isinstance(served, str) else served.url,
        model="m",
        retries=retries,
        timeout_s=timeout_s,
        concurrency=concurrency,
        api_key_env=api_key_env,
    )
    server = ChatServer(settings)
    dialogs: Sequence[Sequence[ChatMessage]] = [[ChatMessage(role="user", content=text)] for text in texts]
    try:
        return server.replies(dialogs, PARAMS, seeds=range(len(texts)))
    finally:
        server.close()


def test_a_request_says_model_messages_and_how_to_draw() -> None:
    with serving(lambda body, before: completion("hello")) as served:
        (reply,) = ask(served, "hi")
    assert served.requests == [
        {
            "model": "m",
            "messages": [{"role": "user", "content": "hi"}],
            "temperature": 0.2,
            "top_p": 0.95,
            "max_tokens": 7,
            "seed": 0,
        }
    ]
    assert reply == Reply(text="hello", finish_reason="stop", prompt_tokens=11, response_tokens=5)


def test_replies_come_in_the_order_of_the_dialogs_and_no_more_than_the_limit_are_under_way() -> None:
    def slowest_first(body: dict, before: int) -> Answer:
        answer = completion(body["messages"][0]["content"])
        return Answer(answer.body, delay_s=0.2 if before == 0 else 0.02)

    texts = [str(number) for number in range(8)]
    with serving(slowest_first) as served:
        replies = ask(served, *texts, concurrency=3)
    assert [reply.text for reply in replies] == texts
    assert served.most_under_way == 3


def test_the_key_is_taken_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", "secret")
    with serving(lambda body, before: completion("")) as served:
        ask(served, "hi", api_key_env="A_KEY")
    assert served.keys == ["Bearer secret"]


def test_a_response_that_was_cut_off_and_one_without_counts_are_read() -> None:
    answers = [completion("abc", finish_reason="length", usage=False), completion(None)]
    with serving(lambda body, before: answers[before]) as served:
        cut, empty = ask(served, "a", "b", concurrency=1)
    assert cut == Reply(text="abc", finish_reason="length", prompt_tokens=None, response_tokens=None)
    assert empty.text == ""


def test_half_a_character_is_no_text() -> None:
    answer = completion("x")
    broken = Answer(answer.body.replace('"content": "x"', '"content": "x\\ud800"'))
    with serving(lambda body, before: broken) as served:
        assert ask(served, "hi")[0].text == "x?"


@pytest.mark.parametrize(
    "first",
    [BUSY, BROKEN, Answer(completion("never").body, missing_bytes=20)],
    ids=["busy", "broken", "cut off in the middle"],
)
def test_what_passes_is_tried_again(first: Answer) -> None:
    with serving(lambda body, before: completion("hello") if before else first) as served:
        (reply,) = ask(served, "hi", retries=1)
    assert reply.text == "hello"
    assert len(served.requests) == 2


def test_a_server_that_is_too_slow_is_asked_again() -> None:
    slow = Answer(completion("never").body, delay_s=30)
    with serving(lambda body, before: completion("hello") if before else slow) as served:
        assert ask(served, "hi", retries=1, timeout_s=1.0)[0].text == "hello"


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (BUSY, r"/v1/chat/completions answered with status 429: .*busy.* \(in 2 tries\)"),
        (BROKEN, r"/v1/chat/completions answered with status 500: .*broken.* \(in 2 tries\)"),
        (
            Answer(completion("x").body, missing_bytes=9),
            r"/v1/chat/completions cannot be reached, in 2 tries: ",
        ),
    ],
)
def test_a_fault_that_stays_is_told_with_address_and_status(answer: Answer, message: str) -> None:
    with serving(lambda body, before: answer) as served, pytest.raises(ServerFault, match=message):
        ask(served, "hi", retries=1)
    assert len(served.requests) == 2


def test_a_server_that_never_answers_is_given_up() -> None:
    slow = Answer(completion("never").body, delay_s=30)
    message = r"gave no answer within server.timeout_s = 0.3, in 1 tries"
    with serving(lambda body, before: slow) as served, pytest.raises(ServerFault, match=message):
        ask(served, "hi", timeout_s=0.3)


def test_a_server_that_is_not_there_is_named() -> None:
    with serving(lambda body, before: completion("")) as served:
        pass
    with pytest.raises(ServerFault, match=rf"{served.url}/chat/completions cannot be reached, in 1 tries"):
        ask(served, "hi")


@pytest.mark.parametrize(
    "body",
    ['{"choices": [{"mess', "[]", '{"choices": []}', '{"choices": [{"message": null}]}', "null", "busy"],
)
def test_an_answer_that_is_no_completion_is_the_servers_fault(body: str) -> None:
    with (
        serving(lambda _, before: Answer(body)) as served,
        pytest.raises(ServerFault, match="answered with what is no chat completion: "),
    ):
        ask(served, "hi")


@pytest.mark.parametrize("reason", ["content_filter", None])
def test_an_answer_that_the_server_ended_is_not_the_models(reason: str | None) -> None:
    with (
        serving(lambda body, before: completion("x", finish_reason=reason)) as served,
        pytest.raises(ServerFault, match=f"ended an answer with finish_reason {reason!r}"),
    ):
        ask(served, "hi")


@pytest.mark.parametrize("status", [400, 401, 404])
def test_a_request_that_is_refused_is_the_users_to_mend(status: int) -> None:
    refusal = Answer('{"error": {"message": "the context is too long"}}', status=status)
    message = f"answered with status {status}: .*too long.*; see whether server.url, server.model, the key"
    with serving(lambda body, before: refusal) as served, pytest.raises(ConfigError, match=message):
        ask(served, "hi", retries=3)
    assert len(served.requests) == 1


def test_one_fault_ends_the_other_requests() -> None:
    def one_bad(body: dict, before: int) -> Answer:
        return BROKEN if body["seed"] == 1 else Answer(completion("x").body, delay_s=30)

    started = time.monotonic()
    with serving(one_bad) as served, pytest.raises(ServerFault, match="status 500"):
        ask(served, "slow", "bad", "slow")
    assert time.monotonic() - started < 20


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ServerConfig(url="localhost:8000", model="m"),
            "server.url = 'localhost:8000': give the whole address",
        ),
        (ServerConfig(url="http://a/v1"), "server.model is empty"),
        (
            ServerConfig(url="http://a/v1", model="m", api_key_env="RLEF_NO_SUCH_KEY"),
            "server.api_key_env = 'RLEF_NO_SUCH_KEY': there is no such variable",
        ),
    ],
)
def test_settings_with_which_nothing_can_be_asked_are_refused(settings: ServerConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_server(settings)
