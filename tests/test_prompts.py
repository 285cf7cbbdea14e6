"""Templates, extraction, truncation and the token ids of a dialog."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlef import prompts
from rlef.config import ConfigError, RolloutConfig
from rlef.pretrained import model_folder
from rlef.prompts import Dialog, FailedTest, extract_code, feedback_text, shorten_trace, turn_outcome
from rlef.records import TurnOutcome
from rlef_sandbox import Result, Test, Verdict


def result(verdict: Verdict, *, stdout: str = "", stderr: str = "") -> Result:
    return Result(
        verdict=verdict,
        exit_code=0,
        signal=None,
        stdout=stdout,
        stderr=stderr,
        stdout_truncated=False,
        stderr_truncated=False,
        cpu_s=0.0,
        wall_s=0.0,
        peak_memory_bytes=0,
    )


def dialog(**settings: int) -> Dialog:
    return Dialog.read(model_folder("embedded"), RolloutConfig(**settings))


@pytest.mark.parametrize(
    ("response", "code"),
    [
        ("Here:\n```python\nprint(1)\n```\nDone.", "print(1)\n"),
        ("```py\nprint(1)\n```", "print(1)\n"),
        ("```\nfirst\n```\n```python\nsecond\n```", "second\n"),
        ("```cpp\nint x;\n```", "int x;\n"),
        ("```python\na\n```\n```python\nb\n```", "a\n"),
        ("```python\nprint(1)\n", "print(1)\n"),
        ("print(1)", None),
        ("", None),
        ("```python", None),
    ],
)
def test_the_program_is_the_first_python_block_else_the_first_block(response: str, code: str | None) -> None:
    assert extract_code(response) == code


def test_a_turn_is_named_by_its_first_failing_test() -> None:
    results = [result(Verdict.PASSED), result(Verdict.TIMEOUT), result(Verdict.EXCEPTION)]
    assert turn_outcome("code", results) is TurnOutcome.TIMEOUT
    assert turn_outcome("code", results[:1]) is TurnOutcome.PASSED
    assert turn_outcome(None, []) is TurnOutcome.NO_CODE


def test_wrong_output_is_told_with_input_expected_output_and_output() -> None:
    failed = FailedTest(test=Test("1 2\n", "3\n"), result=result(Verdict.WRONG_OUTPUT, stdout="12\n"))
    assert feedback_text([failed], max_test_characters=100) == (
        "Your code failed these tests:\n- input:\n1 2\nexpected output:\n3\nyour output:\n12"
        "\nGive it another try."
        "\nPut your program between ```python and ``` and use backticks for nothing else."
    )


@pytest.mark.parametrize(
    ("verdict", "words"),
    [
        (Verdict.TIMEOUT, "it took too long."),
        (Verdict.OUT_OF_MEMORY, "it ran out of memory."),
        (Verdict.OUTPUT_LIMIT, "it printed too much."),
        (Verdict.SECURITY, "it tried something that is not allowed."),
        (Verdict.EXCEPTION, "it raised:\nZeroDivisionError"),
        (Verdict.SYNTAX_ERROR, "it raised:\nZeroDivisionError"),
    ],
)
def test_other_failures_are_told_without_the_expected_output(verdict: Verdict, words: str) -> None:
    failed = FailedTest(test=Test("1\n", "secret\n"), result=result(verdict, stderr="ZeroDivisionError\n"))
    text = feedback_text([failed], max_test_characters=100)
    assert words in text
    assert "secret" not in text


def test_every_failing_test_has_its_bullet() -> None:
    failed = [
        FailedTest(test=Test(f"{number}\n", "0\n"), result=result(Verdict.WRONG_OUTPUT))
        for number in range(3)
    ]
    assert feedback_text(failed, max_test_characters=100).count("- input:") == 3


def test_long_inputs_are_cut_and_marked() -> None:
    failed = FailedTest(test=Test("x" * 50, "y"), result=result(Verdict.WRONG_OUTPUT, stdout="z" * 50))
    text = feedback_text([failed], max_test_characters=10)
    assert "x" * 10 + "...\n" in text
    assert "z" * 11 not in text


def test_a_long_trace_keeps_its_first_line_and_its_last_ones() -> None:
    trace = "Traceback:\n" + "\n".join(f"  line {number}" for number in range(50)) + "\nKeyError: 'a'"
    short = shorten_trace(trace, max_characters=40)
    assert short.startswith("Traceback:\n...\n")
    assert short.endswith("KeyError: 'a'")


@given(st.text(max_size=300), st.integers(20, 200))
def test_a_shortened_trace_fits(trace: str, room: int) -> None:
    assert len(shorten_trace(trace, max_characters=room)) <= room


def test_a_prompt_is_cut_on_the_left_so_that_the_request_stays() -> None:
    cut, whole = dialog(max_prompt_tokens=16), dialog()
    ids = cut.prompt("print " * 50)
    assert len(ids) == 16
    assert ids[-3:] == whole.prompt("print " * 50)[-3:]
    assert ids[0] == whole.prompt("x")[0]


def test_feedback_is_cut_on_the_right_and_marked() -> None:
    ids = dialog(max_feedback_tokens=16).feedback("1 " * 50)
    assert len(ids) == 16
    assert dialog().decode(ids).endswith("...<|assistant|>")


def test_a_statement_that_spells_a_role_marker_stays_text() -> None:
    shown = dialog()
    marker = shown.prompt("x")[-1]
    assert shown.prompt("say <|assistant|> now").count(marker) == 1


def test_only_an_unfinished_response_is_closed() -> None:
    shown = dialog()
    assert shown.close([5, shown.end_token_id]) == []
    assert shown.close([5, 6]) == [shown.end_token_id]
    assert shown.close([]) == [shown.end_token_id]


@given(st.text())
def test_decoding_a_response_gives_its_text_back(text: str) -> None:
    shown = dialog()
    assert shown.decode(shown.response(text)) == text


def test_fixed_texts_are_single_tokens_of_the_embedded_tokenizer() -> None:
    shown = dialog()
    assert all(len(shown.response(text)) == 2 for text in prompts.TEMPLATE_TEXTS)


def test_a_role_marker_that_the_tokenizer_lacks_is_named() -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model_folder("embedded") / "tokenizer.json"))
    with pytest.raises(ConfigError, match=r"dialog.json: the tokenizer has no token '<user>'"):
        Dialog(tokenizer, RolloutConfig(), user="<user>", assistant="<|assistant|>", end="<|end|>")


def dialog_with(*, settings: RolloutConfig | None = None, **markers: str) -> Dialog:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model_folder("embedded") / "tokenizer.json"))
    named = {"user": "<|user|>", "assistant": "<|assistant|>", "end": "<|end|>"}
    return Dialog(tokenizer, settings or RolloutConfig(), **named | markers)


def test_a_marker_may_be_a_text_with_special_tokens_and_the_first_one_another() -> None:
    shown = dialog_with(
        first="Be brief.<|end|><|user|>", user="\n<|user|>\n", assistant="<|end|>\n<|assistant|>"
    )
    request = prompts.prompt_text("x")
    assert shown.decode(shown.prompt("x")) == f"Be brief.<|user|>{request}\n<|assistant|>"
    assert shown.prompt("x").count(shown.end_token_id) == 2
    assert shown.decode(shown.feedback("No.")) == "\n<|user|>\nNo.\n<|assistant|>"


def test_a_marker_that_a_statement_could_spell_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"dialog.json: the tokenizer has no token 'User: '"):
        dialog_with(user="User: ")


def test_the_end_of_a_response_is_one_token() -> None:
    with pytest.raises(ConfigError, match=r"dialog.json: the tokenizer has no token '<\|end\|>\\n'"):
        dialog_with(end="<|end|>\n")


def test_a_stub_begins_the_response_and_is_code() -> None:
    stub, shown = "def f(n):\n", dialog_with()
    assert shown.decode(shown.prompt("x", stub=stub)).endswith("<|assistant|>```python\ndef f(n):\n")
    assert shown.decode(shown.feedback("No.", stub=stub)).endswith("<|assistant|>```python\ndef f(n):\n")
    assert extract_code("    return n\n```\nDone. ```python\nx\n```", stub=stub) == stub + "    return n\n"
    assert extract_code("    return n", stub=stub) == stub + "    return n"
    assert extract_code("", stub=stub) == stub


@given(st.text(), st.text(min_size=1))
def test_what_was_told_is_found_before_a_stub(text: str, stub: str) -> None:
    shown = dialog_with()
    assert shown.told(shown.prompt(text, stub=stub), stub=stub) == prompts.prompt_text(text)
    assert shown.told(shown.feedback(text, stub=stub), stub=stub) == text


def test_a_stub_takes_its_room_from_the_message_before_it() -> None:
    shown = dialog_with(settings=RolloutConfig(max_prompt_tokens=40, max_feedback_tokens=40))
    stub = "def f(n):\n"
    assert len(shown.prompt("z" * 100, stub=stub)) == 40
    assert len(shown.feedback("z" * 100, stub=stub)) == 40
    shown.check_stub(stub, "p")
    with pytest.raises(
        ConfigError,
        match=r"rollout\.max_prompt_tokens = 40 leaves no room before the stub of problem 'p'; use at least",
    ):
        shown.check_stub("zq" * 50, "p")


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("Write f.\n", "Write f.\n\nBegin your program with this:\n\ndef f(n):\n"),
        ("Write:\ndef f(n):", "Write:\ndef f(n):"),
    ],
)
def test_a_statement_takes_in_a_stub_that_it_has_not(statement: str, expected: str) -> None:
    assert prompts.with_stub(statement, "def f(n):\n") == expected


@given(st.text(), st.sampled_from([None, "<|user|>Be brief.<|end|><|user|>"]), st.booleans())
def test_what_was_told_is_found_between_its_markers(text: str, first: str | None, is_cut_off: bool) -> None:
    shown = dialog_with(user="\n<|user|>", **({} if first is None else {"first": first}))
    assert shown.told(shown.prompt(text)) == prompts.prompt_text(text)
    closing = shown.close([5]) if is_cut_off else []
    assert shown.told([*closing, *shown.feedback(text)]) == text


def test_markers_that_leave_no_room_for_a_message_are_refused_with_what_would_do() -> None:
    def shown(**tokens: int) -> Dialog:
        markers = {"first": "zq" * 10 + "<|user|>", "user": "zq" * 9 + "<|user|>"}  # 21 tokens, and 19
        return dialog_with(settings=RolloutConfig(**tokens), **markers)

    with pytest.raises(
        ConfigError,
        match=r"rollout\.max_prompt_tokens = 23 leaves no room .*, which take 22 tokens; use at least 24$",
    ):
        shown(max_prompt_tokens=23)
    with pytest.raises(ConfigError, match=r"rollout\.max_feedback_tokens = 21 leaves no room .* 20 tokens"):
        shown(max_feedback_tokens=21)
    fitting = shown(max_prompt_tokens=24, max_feedback_tokens=22)
    assert (len(fitting.prompt("z" * 50)), len(fitting.feedback("z" * 50))) == (24, 22)


def test_a_tokenizer_larger_than_the_models_vocabulary_is_refused() -> None:
    shown = dialog()
    shown.check_vocabulary(512)
    with pytest.raises(
        ConfigError, match=r"tokenizer.json has \d+ tokens, but config.json says vocab_size = 100"
    ):
        shown.check_vocabulary(100)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        (
            '{"user": "<|user|>"}',
            "must name a marker each for user, assistant, end, and nothing else but first",
        ),
        ('["user"]', "must name a marker each for user, assistant, end, and nothing else but first"),
    ],
)
def test_a_bad_dialog_file_is_reported_with_its_name(tmp_path: Path, text: str, message: str) -> None:
    shutil.copy(model_folder("embedded") / "tokenizer.json", tmp_path)
    (tmp_path / "dialog.json").write_text(text)
    with pytest.raises(ConfigError, match=f"dialog.json {message}"):
        Dialog.read(tmp_path, RolloutConfig())


def test_a_truncated_tokenizer_is_reported_with_its_name(tmp_path: Path) -> None:
    shutil.copy(model_folder("embedded") / "dialog.json", tmp_path)
    text = (model_folder("embedded") / "tokenizer.json").read_text(encoding="utf-8")
    (tmp_path / "tokenizer.json").write_text(text[:1000], encoding="utf-8")
    with pytest.raises(ConfigError, match=r"tokenizer.json cannot be read .*; copy it again"):
        Dialog.read(tmp_path, RolloutConfig())
