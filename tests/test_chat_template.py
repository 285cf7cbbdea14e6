"""Markers from templates as published models have them, and templates that have none."""

from __future__ import annotations

import pytest

from rlef.chat_template import dialog_markers
from rlef.config import ConfigError
from tests.gguf_examples import CHATML

CHATML_TOKENS = ["<|im_start|>", "<|im_end|>"]
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    "+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA3_TOKENS = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eot"]
ASK = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
PLAIN = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}" + ASK
ENDED = PLAIN.replace("{% endfor %}", "{% if m.role == 'assistant' %}<|end|>{% endif %}{% endfor %}")


def test_a_system_message_comes_first() -> None:
    assert dialog_markers(CHATML, special_tokens=CHATML_TOKENS) == {
        "first": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n",
        "user": "\n<|im_start|>user\n",
        "assistant": "<|im_end|>\n<|im_start|>assistant\n",
        "end": "<|im_end|>",
    }


def test_the_template_knows_its_tokens_and_the_longest_end_is_taken() -> None:
    assert dialog_markers(LLAMA3, special_tokens=LLAMA3_TOKENS, bos_token="<|begin_of_text|>") == {
        "first": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n",
        "user": "<|start_header_id|>user<|end_header_id|>\n\n",
        "assistant": "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "end": "<|eot_id|>",
    }


def test_first_is_left_out_where_every_message_begins_alike() -> None:
    markers = dialog_markers(ENDED, special_tokens=["<|end|>", "<|user|>", "<|assistant|>"])
    assert markers == {"user": "<|user|>", "assistant": "<|assistant|>", "end": "<|end|>"}


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (PLAIN, r"ends a response with '<\|user\|>', which does not begin with a special token"),
        ("{{ messages[0].content }}", "writes a message 0 times"),
        ("{% for m in messages %}{{ m.content * 2 }}{% endfor %}", "writes a message 2 times"),
        (
            "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}",
            "changes what it has written when the dialog goes on .'1THE-QUESTION' becomes '3THE-QUESTION'",
        ),
        (
            "{{ raise_exception('System role not supported') }}",
            r"cannot be run \(System role not supported\)",
        ),
        ("{% for %}", "cannot be run"),
        ("{{ messages[7].content }}", "cannot be run"),
        ("{{ messages.pop() }}", "cannot be run .*unsafe"),
        ("{{ ''.__class__.__mro__ }}", "cannot be run .*unsafe"),
    ],
)
def test_a_template_that_makes_no_markers_is_refused(template: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dialog_markers(template, special_tokens=CHATML_TOKENS)
