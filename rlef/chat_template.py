"""Chat templates, as models bring them in Jinja: the role markers that `prompts.Dialog` puts around a dialog.

A template is foreign code, so it runs in Jinja's sandbox, on a dialog whose messages can be found again in
what it writes. What stands around them are the markers.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from rlef.config import ConfigError

_QUESTION, _ANSWER, _REPLY = "THE-QUESTION", "THE-ANSWER", "THE-REPLY"


def dialog_markers(template: str, *, special_tokens: Collection[str], **tokens: str) -> dict[str, str]:
    """The content of a `dialog.json`, for a template that writes every message between fixed texts.

    `tokens` are what a template may name besides the messages, such as `bos_token`. `first` is left out where
    it would repeat `user`.

    Raises:
        ConfigError: the template cannot be run, or writes dialogs that such a file cannot describe.
    """
    opening = [{"role": "user", "content": _QUESTION}]
    answered = [*opening, {"role": "assistant", "content": _ANSWER}, {"role": "user", "content": _REPLY}]
    prompt, dialog = _render(template, opening, tokens), _render(template, answered, tokens)
    first, assistant = _split(prompt, _QUESTION)
    before_answer, after_answer = _split(dialog, _ANSWER)
    closing, before_response = _split(after_answer, _REPLY)
    if before_answer != prompt or before_response != assistant:
        raise ConfigError(
            "the chat template changes what it has written when the dialog goes on "
            f"({prompt!r} becomes {before_answer!r}), which dialog.json cannot express"
        )
    end = max((token for token in special_tokens if token and closing.startswith(token)), key=len, default="")
    if not end:
        raise ConfigError(
            f"the chat template ends a response with {closing!r}, which does not begin with a special token "
            "of the tokenizer; dialog.json needs one"
        )
    markers = {"first": first, "user": closing.removeprefix(end), "assistant": assistant, "end": end}
    if markers["first"] == markers["user"]:
        del markers["first"]
    return markers


def _render(template: str, messages: list[dict[str, str]], tokens: dict[str, str]) -> str:
    """As transformers renders it, but that the template is not told the date."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )

    def raise_exception(message: str) -> NoReturn:
        raise TemplateError(message)

    names: dict[str, Any] = {"raise_exception": raise_exception, **tokens}
    try:
        return environment.from_string(template).render(
            messages=messages, add_generation_prompt=True, **names
        )
    except (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ConfigError(f"the chat template cannot be run ({error})") from None


def _split(text: str, message: str) -> tuple[str, str]:
    """What stands before and after a message."""
    if text.count(message) != 1:
        raise ConfigError(
            f"the chat template writes a message {text.count(message)} times, which dialog.json cannot "
            "express"
        )
    before, _, after = text.partition(message)
    return before, after
