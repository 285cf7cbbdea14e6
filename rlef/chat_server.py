"""A model behind an OpenAI-compatible server, asked by chat completions: the one file that imports `openai`.

Messages go as text and answers come as text, which every such server speaks; the server's own chat template
and tokenizer stand between. What the server or the network does wrong is a `ServerFault`, never an answer.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

from rlef.config import ConfigError, ServerConfig
from rlef.ports import SamplingParams


class ServerFault(RuntimeError):  # noqa: N818 - as SandboxFault: no fault of the model
    """The server did not answer, or with something that is no answer. What was asked can be asked again."""


class ChatMessage(TypedDict):
    role: str  # "user" or "assistant"
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What the model said. The server counts the tokens; None where it does not."""

    text: str
    finish_reason: str  # "stop" or "length"
    prompt_tokens: int | None
    response_tokens: int | None


def check_server(settings: ServerConfig) -> None:
    """Refuse, before anything starts, settings with which no request could be made.

    Raises:
        ConfigError: what to mend.
    """
    if importlib.util.find_spec("openai") is None:
        raise ConfigError("server.url is given, but openai is not installed: pip install 'rlef[eval]'")
    if not settings.url.startswith(("http://", "https://")):
        raise ConfigError(
            f"server.url = {settings.url!r}: give the whole address of the API, such as "
            "http://127.0.0.1:8000/v1"
        )
    if not settings.model:
        raise ConfigError(f"server.model is empty: name the model that {settings.url} is to answer with")
    if settings.api_key_env and not os.environ.get(settings.api_key_env):
        raise ConfigError(
            f"server.api_key_env = {settings.api_key_env!r}: there is no such variable in the environment, "
            "or it is empty; export the key under that name"
        )


class ChatServer:
    """A door to one model."""

    def __init__(self, settings: ServerConfig) -> None:
        """Nothing is sent yet. `check_server` must have passed."""
        from openai import AsyncOpenAI

        self._settings = settings
        self._runner = asyncio.Runner()
        self._client = AsyncOpenAI(
            base_url=settings.url,
            # The client insists on a key, and servers of one's own ask for none.
            api_key=os.environ[settings.api_key_env] if settings.api_key_env else "none",
            timeout=settings.timeout_s,
            max_retries=settings.retries,
        )

    def replies(
        self, dialogs: Sequence[Sequence[ChatMessage]], params: SamplingParams, *, seeds: Sequence[int]
    ) -> list[Reply]:
        """The model's answers to dialogs that end with the user's message, in their order.

        `server.concurrency` requests are under way at once. What may pass (no connection, no answer in time,
        408, 409, 429 and 5xx) is tried again, `server.retries` times, with growing pauses. `params.seed` is
        not sent, but the seed of each request.

        Raises:
            ConfigError: the server refuses a request as it is.
            ServerFault: it does not answer, or not with a chat completion. The other requests are cancelled.
        """
        return self._runner.run(self._replies(dialogs, params, seeds))

    def close(self) -> None:
        self._runner.run(self._client.close())
        self._runner.close()

    async def _replies(
        self, dialogs: Sequence[Sequence[ChatMessage]], params: SamplingParams, seeds: Sequence[int]
    ) -> list[Reply]:
        gate = asyncio.Semaphore(self._settings.concurrency)

        async def reply(messages: Sequence[ChatMessage], seed: int) -> Reply:
            async with gate:
                return self._read(await self._ask(messages, params, seed))

        try:
            async with asyncio.TaskGroup() as group:
                asked = [
                    group.create_task(reply(messages, seed))
                    for messages, seed in zip(dialogs, seeds, strict=True)
                ]
        except BaseExceptionGroup as faults:
            raise faults.exceptions[0] from None
        return [task.result() for task in asked]

    async def _ask(self, messages: Sequence[ChatMessage], params: SamplingParams, seed: int) -> str:
        import openai

        try:
            raw = await self._client.chat.completions.with_raw_response.create(
                model=self._settings.model,
                messages=list(messages),  # type: ignore[arg-type]
                temperature=params.temperature,
                top_p=params.top_p,
                max_tokens=params.max_tokens,
                seed=seed,
            )
        except openai.APITimeoutError:
            raise ServerFault(
                f"{self._asked} gave no answer within server.timeout_s = {self._settings.timeout_s:g}, "
                f"{self._tries}"
            ) from None
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            raise ServerFault(f"{self._asked} cannot be reached, {self._tries}: {cause}") from None
        except openai.APIStatusError as error:
            raise self._refused(error.status_code, error.response.text) from None
        return raw.text

    @property
    def _asked(self) -> str:
        return f"{self._settings.url.rstrip('/')}/chat/completions"

    @property
    def _tries(self) -> str:
        return f"in {self._settings.retries + 1} tries"

    def _refused(self, status: int, body: str) -> ConfigError | ServerFault:
        said = f"{self._asked} answered with status {status}: {_shortened(body)}"
        if status >= 500 or status in (408, 409, 429):
            return ServerFault(f"{said} ({self._tries})")
        return ConfigError(
            f"{said}; see whether server.url, server.model, the key and the lengths in rollout.* are what it "
            "wants"
        )

    def _read(self, body: str) -> Reply:
        """Read by hand: the client hands out whatever JSON it got under its own types."""
        try:
            answer = json.loads(body)
            (choice,) = answer["choices"]
            text, finish_reason = choice["message"].get("content") or "", choice["finish_reason"]
            usage = answer.get("usage") or {}
            prompt_tokens, response_tokens = usage.get("prompt_tokens"), usage.get("completion_tokens")
        except (ValueError, LookupError, TypeError, AttributeError):
            raise ServerFault(
                f"{self._asked} answered with what is no chat completion: {_shortened(body)}"
            ) from None
        if finish_reason not in ("stop", "length"):
            raise ServerFault(
                f"{self._asked} ended an answer with finish_reason {finish_reason!r}: only 'stop' and "
                "'length' are the model's own"
            )
        return Reply(
            # JSON can spell halves of characters, which are no text.
            text=text.encode("utf-8", errors="replace").decode("utf-8"),
            finish_reason=finish_reason,
            prompt_tokens=prompt_tokens,
            response_tokens=response_tokens,
        )


def _shortened(body: str) -> str:
    line = " ".join(body.split())
    return line if len(line) <= 200 else line[:200] + "..."
