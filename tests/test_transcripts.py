from __future__ import annotations

from pathlib import Path

import pytest

from rlef.config import ConfigError, RolloutConfig
from rlef.pretrained import model_folder
from rlef.prompts import Dialog
from rlef.records import Episode, Turn
from rlef.transcripts import (
    Transcript,
    TranscriptTurn,
    append_transcripts,
    of_episode,
    read_transcripts,
    within,
)
from tests.evaluation_examples import NO_CODE, PASSED, WRONG, transcript


def test_an_episode_becomes_text_with_the_tokens_that_each_turn_read_and_wrote() -> None:
    dialog = Dialog.read(model_folder("embedded"), RolloutConfig())
    prompt, response = dialog.prompt("Say."), dialog.response("```python\nprint(1)\n```")
    episode = Episode(
        problem_id="p",
        number=3,
        token_ids=[*prompt, *response],
        sampled=[False] * len(prompt) + [True] * len(response),
        logprobs=[0.0] * (len(prompt) + len(response)),
        versions=[0] * (len(prompt) + len(response)),
        turns=(
            Turn(
                start=len(prompt),
                end=len(prompt) + len(response),
                finish_reason="stop",
                code="print(1)\n",
                outcome=PASSED,
                public_results=(),
                seconds=2.0,
            ),
        ),
        solved=True,
    )
    assert of_episode(episode, dialog) == Transcript(
        problem_id="p",
        number=3,
        turns=(
            TranscriptTurn(
                response="```python\nprint(1)\n```",
                code="print(1)\n",
                outcome=PASSED,
                finish_reason="stop",
                prompt_tokens=len(prompt),
                response_tokens=len(response),
                seconds=2.0,
            ),
        ),
        solved=True,
    )


def test_a_lower_limit_ends_a_dialog_that_had_failed_by_then() -> None:
    whole = transcript(WRONG, WRONG, PASSED, solved=True)
    assert within(whole, turns=3) is whole
    assert within(whole, turns=5) is whole
    assert within(whole, turns=2) == transcript(WRONG, WRONG, solved=False)


def test_what_was_written_is_read_again_whatever_the_text(tmp_path: Path) -> None:
    path = tmp_path / "dialogs.jsonl"
    odd = transcript(WRONG, NO_CODE, codes=['"\u2028\r\n\x00 é', None], tokens=None)
    append_transcripts(path, [odd])
    append_transcripts(path, [transcript(PASSED, solved=True)])
    assert read_transcripts(path) == [odd, transcript(PASSED, solved=True)]


def test_a_line_that_a_crash_cut_off_is_left_out_and_written_over(tmp_path: Path) -> None:
    path = tmp_path / "dialogs.jsonl"
    first, second = transcript(PASSED, solved=True), transcript(WRONG, number=1)
    append_transcripts(path, [first, second])
    path.write_bytes(path.read_bytes()[:-7])
    assert read_transcripts(path) == [first]
    append_transcripts(path, [second])
    assert read_transcripts(path) == [first, second]


def test_no_file_holds_no_transcripts(tmp_path: Path) -> None:
    assert read_transcripts(tmp_path / "none.jsonl") == []


def test_a_line_that_is_no_transcript_is_named_with_its_field(tmp_path: Path) -> None:
    path = tmp_path / "dialogs.jsonl"
    append_transcripts(path, [transcript(PASSED)])
    path.write_bytes(path.read_bytes() * 2)
    text = path.read_text().splitlines()
    path.write_text(f"{text[0]}\n" + text[1].replace('"passed"', '"past"') + "\n")
    with pytest.raises(
        ConfigError, match=r"dialogs.jsonl, line 2: field 'turns.0.outcome': .*; delete the file"
    ):
        read_transcripts(path)
