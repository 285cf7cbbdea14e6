"""The folder of an evaluation: its dialogs, so that it goes on where it stopped, and what came of them.

`identity.json` says what was sampled; `transcripts/` holds a file of JSON lines per way to draw; figures are
`evaluation.json` and `evaluation.html`, which can be made again from the transcripts at any time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rlef.config import Config, ConfigError, EvaluationConfig
from rlef.files import write_text
from rlef.measurement import Cell, Draw, draws_of
from rlef.ports import Play, SamplingParams
from rlef.records import Problem
from rlef.transcripts import Transcript, append_transcripts, read_transcripts
from rlef.unrelated import kind_of_random_feedback

IDENTITY_FILE = "identity.json"
FIGURES_FILE = "evaluation.json"


def identity_of(config: Config, problems: Sequence[Problem], *, weights: str | None) -> dict[str, Any]:
    """What a transcript depends on: the same identity, the same dialogs. `weights` is `weights_digest`, or
    None for a model behind a server."""
    rollout = config.rollout
    return {
        "model": config.model.path if weights else {"url": config.server.url, "name": config.server.model},
        "weights": weights,
        "sampler": rollout.sampler if weights else "server",
        "problems": problems_digest(problems),
        "seed": config.run.seed,
        "turns": max(config.evaluation.turn_limits),
        "max_prompt_tokens": rollout.max_prompt_tokens,
        "max_feedback_tokens": rollout.max_feedback_tokens,
        "max_test_characters": rollout.max_test_characters,
        "max_response_tokens": rollout.max_response_tokens,
        "random_feedback": kind_of_random_feedback(problems),
    }


def problems_digest(problems: Sequence[Problem]) -> str:
    """Of what a model is shown and judged by, in the problems' order."""
    digest = hashlib.sha256()
    for problem in problems:
        shown = (problem.id, problem.statement, problem.public_tests, problem.private_tests)
        digest.update(repr((*shown, problem.time_limit_s, problem.memory_limit_bytes)).encode())
        if problem.dialect != "code_contests" or problem.stub:  # before there were others, it had no say
            digest.update(repr((problem.dialect, problem.stub)).encode())
    return digest.hexdigest()


def weights_digest(folder: Path) -> str:
    """Of a model folder's weights, which may have been trained on under the same name."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


class EvaluationFolder:
    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        """Opened, or made if it is not there.

        Raises:
            ConfigError: it holds an evaluation of something else, or cannot be written.
        """
        self.path = path
        existing = path / IDENTITY_FILE
        try:
            (path / "transcripts").mkdir(parents=True, exist_ok=True)
            if not existing.exists():
                write_text(existing, json.dumps(identity, indent=1) + "\n")
        except OSError as error:
            raise ConfigError(f"{path} cannot be written ({error.strerror}); name another folder") from None
        found = read_json(existing)
        for name in sorted(set(found) | set(identity)):
            if found.get(name) != identity.get(name):
                raise ConfigError(
                    f"{path} holds dialogs whose {name} is {found.get(name)!r}, not {identity.get(name)!r}: "
                    "name another folder, or set it back to go on with this one"
                )

    def read(self, draw: Draw, problems: Sequence[Problem]) -> list[Transcript]:
        """Those transcripts of a draw that are there: the first ones, in whole rounds over the problems."""
        path = _file_of(self.path, draw)
        transcripts = read_transcripts(path)[: draw.rollouts * len(problems)]
        _check_order(path, transcripts, problems)
        return transcripts

    def complete(
        self,
        draw: Draw,
        problems: Sequence[Problem],
        transcripts: list[Transcript],
        *,
        play: Play[Transcript],
        params: SamplingParams,
        batch: int,
        note: Callable[[str], None],
    ) -> None:
        """Add to `transcripts`, which `read` has given, those that are missing: `batch` at a time, each batch
        on the disk before the next one starts."""
        total = draw.rollouts * len(problems)
        for start in range(len(transcripts), total, batch):
            note(f"{draw.name}: {start} of {total} dialogs")
            numbers = range(start, min(start + batch, total))
            played = play(
                [problems[number % len(problems)] for number in numbers],
                numbers=numbers,
                params=params,
                turns=draw.turns,
                feedback=draw.feedback,
            )
            append_transcripts(_file_of(self.path, draw), played)
            transcripts += played

    def write_figures(self, figures: Mapping[str, Any]) -> None:
        write_text(self.path / FIGURES_FILE, json.dumps(figures, indent=1, allow_nan=False) + "\n")


def figures_of(cells: Sequence[Cell], config: Config, identity: Mapping[str, Any]) -> dict[str, Any]:
    """`evaluation.json`."""
    return {
        "identity": dict(identity),
        "evaluation": config.evaluation.model_dump(mode="json"),
        "cells": [asdict(cell) for cell in cells],
    }


def read_json(path: Path) -> dict[str, Any]:
    """Raises ConfigError: it is missing, or not a JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"{path} is missing: name the folder of an evaluation that has ended") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); evaluate again") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is not a JSON object; evaluate again")
    return content


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """An evaluation that has ended, as its folder holds it."""

    path: Path
    identity: dict[str, Any]
    evaluation: EvaluationConfig
    drawn: dict[Draw, list[Transcript]]


def read_ended(path: Path) -> Ended:
    """Raises ConfigError: the folder is not one of an evaluation that has ended."""
    figures = read_json(path / FIGURES_FILE)
    try:
        evaluation = EvaluationConfig.model_validate_json(json.dumps(figures["evaluation"]))
        identity, problems = figures["identity"], figures["cells"][0]["problems"]
    except (LookupError, TypeError, ValidationError):
        raise ConfigError(
            f"{path / FIGURES_FILE} has not the figures that rlef writes; evaluate again"
        ) from None
    drawn: dict[Draw, list[Transcript]] = {}
    for draw in draws_of(evaluation):
        transcripts = read_transcripts(_file_of(path, draw))[: draw.rollouts * problems]
        if len(transcripts) < draw.rollouts * problems:
            raise ConfigError(f"{_file_of(path, draw)} is incomplete; evaluate again into the same folder")
        drawn[draw] = transcripts
    return Ended(path=path, identity=identity, evaluation=evaluation, drawn=drawn)


def _file_of(path: Path, draw: Draw) -> Path:
    return path / "transcripts" / f"{draw.name}.jsonl"


def _check_order(path: Path, transcripts: Sequence[Transcript], problems: Sequence[Problem]) -> None:
    for place, transcript in enumerate(transcripts):
        expected = problems[place % len(problems)].id
        if (transcript.number, transcript.problem_id) != (place, expected):
            raise ConfigError(
                f"{path}, line {place + 1}: number {transcript.number} of problem {transcript.problem_id!r} "
                f"in the place of number {place} of {expected!r}; delete the file to sample it anew"
            )
