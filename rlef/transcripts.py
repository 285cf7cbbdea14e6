"""Evaluated dialogs as text, and the JSON lines that keep them.

A transcript has what an evaluation's figures are made from, whatever sampled it: an `Episode` without its
tokens, or a dialog with a model behind a server, whose tokens are not seen.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from rlef.config import ConfigError
from rlef.files import naming, sync
from rlef.prompts import Dialog
from rlef.records import Episode, TurnOutcome


@dataclass(frozen=True, slots=True, kw_only=True)
class TranscriptTurn:
    """One response, and what its public tests said."""

    response: str  # what was sampled, without the stub that it may go on from
    code: str | None
    outcome: TurnOutcome
    finish_reason: str  # "stop" or "length"
    prompt_tokens: int | None  # of the whole dialog before the response; None where a server does not say
    response_tokens: int | None
    seconds: float  # its share of the wall-clock time in which the turns beside it were sampled and executed


@dataclass(frozen=True, slots=True, kw_only=True)
class Transcript:
    """One problem, attempted until its public tests passed or the turns ran out."""

    problem_id: str
    number: int  # unique among the transcripts of one file: it keyed the random numbers
    turns: tuple[TranscriptTurn, ...]
    solved: bool  # the last code passed every test, public and private


_TRANSCRIPT = TypeAdapter(Transcript)


def of_episode(episode: Episode, dialog: Dialog) -> Transcript:
    return Transcript(
        problem_id=episode.problem_id,
        number=episode.number,
        turns=tuple(
            TranscriptTurn(
                response=dialog.decode(episode.token_ids[turn.start : turn.end]),
                code=turn.code,
                outcome=turn.outcome,
                finish_reason=turn.finish_reason,
                prompt_tokens=turn.start,
                response_tokens=turn.end - turn.start,
                seconds=turn.seconds,
            )
            for turn in episode.turns
        ),
        solved=episode.solved,
    )


def within(transcript: Transcript, *, turns: int) -> Transcript:
    """What the dialog would have been with a limit of `turns` responses.

    A dialog does not know how many turns it may have: up to its limit, a shorter one is the same word by
    word. One that goes on had failed its public tests, so with a lower limit it is not solved.
    """
    if len(transcript.turns) <= turns:
        return transcript
    return replace(transcript, turns=transcript.turns[:turns], solved=False)


def read_transcripts(path: Path) -> list[Transcript]:
    """All whole lines; none if there is no file. A line that a crash cut off at the end is left out.

    Raises:
        ConfigError: a line is not a transcript.
    """
    if not path.exists():
        return []
    transcripts: list[Transcript] = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                break
            try:
                transcripts.append(_TRANSCRIPT.validate_json(line))
            except ValidationError as error:
                first = error.errors()[0]
                field = ".".join(str(part) for part in first["loc"])
                raise ConfigError(
                    f"{path}, line {number}: field {field!r}: {first['msg']}; "
                    "delete the file to sample it anew"
                ) from None
    return transcripts


def append_transcripts(path: Path, transcripts: Sequence[Transcript]) -> None:
    """Add whole lines after the whole lines that are there, and return when they are on the disk."""
    lines = "".join(json.dumps(asdict(transcript), ensure_ascii=False) + "\n" for transcript in transcripts)
    is_new = not path.exists()
    with naming(path), path.open("ab") as file:
        file.truncate(_end_of_whole_lines(path))
        file.write(lines.encode("utf-8"))
        file.flush()
        os.fsync(file.fileno())
    if is_new:
        sync(path.parent)


def _end_of_whole_lines(path: Path) -> int:
    """Bytes up to the end of the last line that ends."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if size:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.seek(0)
                return file.read().rfind(b"\n") + 1
    return size
