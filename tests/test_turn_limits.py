"""What bench/turn_limits.py counts in dialogs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench.turn_limits import LENGTHS, TURN_LIMITS, feedback_tokens
from rlef.arithmetic import check_context
from rlef.families import read_shape
from rlef.measurement import at_its_extremes
from rlef.pretrained import model_folder
from rlef.settings_file import load_config
from rlef.transcripts import Transcript
from tests.evaluation_examples import PASSED, WRONG, transcript
from tests.small_runs import ROOT


def with_prompts(dialog: Transcript, *tokens: int, finish_reason: str) -> Transcript:
    turns = [
        replace(turn, prompt_tokens=read, finish_reason=finish_reason)
        for turn, read in zip(dialog.turns, tokens, strict=True)
    ]
    return replace(dialog, turns=tuple(turns))


@pytest.mark.parametrize(("finish_reason", "told"), [("stop", [7, 9]), ("length", [6, 8])])
def test_feedback_is_what_a_dialog_grows_by_between_two_responses(
    finish_reason: str, told: list[int]
) -> None:
    """Responses have two tokens; one that was cut is closed by one token more."""
    dialog = with_prompts(transcript(WRONG, WRONG, PASSED), 20, 29, 40, finish_reason=finish_reason)
    assert feedback_tokens(dialog) == told


def test_the_most_turns_fit_the_embedded_model() -> None:
    overrides = [f"rollout.{name}={tokens}" for name, tokens in LENGTHS.items()]
    overrides.append(f"evaluation.turn_limits={','.join(map(str, TURN_LIMITS))}")
    config = load_config(ROOT / "configs" / "tiny.toml", overrides)
    check_context(at_its_extremes(config), read_shape(model_folder("embedded")).max_position_embeddings)
