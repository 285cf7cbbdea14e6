"""Commands that need only a part of a training run: evaluate a model folder, export a run's policy."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlef import problems as sources
from rlef.chat_server import ChatServer
from rlef.checkpoint import CheckpointStore
from rlef.config import Config, ConfigError, RolloutConfig
from rlef.evaluate import SEED_OFFSET, evaluate, summarise
from rlef.evaluation_folder import EvaluationFolder, figures_of, identity_of, weights_digest
from rlef.execution import open_executor
from rlef.families import read_config, read_shape, with_dtype
from rlef.few_shot import read_examples
from rlef.measurement import draws_of, measure
from rlef.pieces import Piece, State
from rlef.ports import Play, SamplingParams, StreamingSampler
from rlef.pretrained import StoredWeights, model_folder, read_pretrained, write_config, write_weights
from rlef.prompts import Dialog
from rlef.records import Episode, ModelShape, Problem
from rlef.rollout import collect
from rlef.run_folder import RunFolder
from rlef.samplers import build_sampler
from rlef.served_rollouts import collect_served
from rlef.shards import stage_weights
from rlef.transcripts import Transcript, of_episode
from rlef.unrelated import UnrelatedFeedback, unrelated_feedback
from rlef.validators import require_validators
from rlef_sandbox import Executor

SOURCE = "source"
_BATCHES = (
    4  # of dialogs that are sampled at once: few wait for the last one, and little is lost when it stops
)
_OTHER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
    "dialog.json",
)


def evaluate_model(config: Config) -> dict[str, Any]:
    """The four conditions on `problems.eval`, in this process alone; figures as in `summary.json`."""
    problems = sources.load(config, "eval")
    with _model(config, problems) as model:
        evaluation = evaluate(problems, rollouts=model.episodes, config=config)
    return summarise(evaluation)


def evaluate_matrix(config: Config, path: Path, *, note: Callable[[str], None]) -> dict[str, Any]:
    """Budgets x turn limits x kinds of feedback on `problems.eval`, kept in the folder `path`; what is there
    already is not sampled again. The figures, as in its `evaluation.json`.

    Raises:
        ConfigError, ServerFault, SandboxFault: what to mend, or what failed; whole batches are kept.
    """
    is_served = bool(config.server.url)
    problems = sources.load(config, "eval")
    weights = None if is_served else weights_digest(model_folder(config.model.path))
    identity = identity_of(config, problems, weights=weights)
    folder = EvaluationFolder(path, identity)
    drawn = {draw: folder.read(draw, problems) for draw in draws_of(config.evaluation)}
    missing = [draw for draw, kept in drawn.items() if len(kept) < draw.rollouts * len(problems)]
    if missing:
        with (_server if is_served else _transcribed_model)(config, problems) as play:
            for draw in missing:
                folder.complete(
                    draw,
                    problems,
                    drawn[draw],
                    play=play,
                    params=SamplingParams(
                        temperature=draw.temperature,
                        top_p=draw.top_p,
                        max_tokens=config.rollout.max_response_tokens,
                        seed=config.run.seed + SEED_OFFSET,
                    ),
                    batch=_BATCHES * (config.server.concurrency if is_served else config.rollout.slots),
                    note=note,
                )
    figures = figures_of(measure(drawn, config.evaluation, seed=config.run.seed), config, identity)
    folder.write_figures(figures)
    return figures


@dataclass(frozen=True, slots=True, kw_only=True)
class _Model:
    """`model.path` and what is needed to talk with it."""

    sampler: StreamingSampler
    executor: Executor
    dialog: Dialog
    rollout: RolloutConfig
    unrelated: UnrelatedFeedback | None

    def episodes(self, problems: Sequence[Problem], **settings: Any) -> Sequence[Episode]:
        return collect(
            problems,
            sampler=self.sampler,
            executor=self.executor,
            dialog=self.dialog,
            settings=self.rollout,
            unrelated=self.unrelated,
            **settings,
        ).episodes

    def transcripts(self, problems: Sequence[Problem], **settings: Any) -> list[Transcript]:
        return [of_episode(episode, self.dialog) for episode in self.episodes(problems, **settings)]


@contextmanager
def _model(config: Config, problems: Sequence[Problem]) -> Iterator[_Model]:
    folder = model_folder(config.model.path)
    shape, weights = read_pretrained(folder)
    dialog = Dialog.read(folder, config.rollout)
    with (
        closing(build_sampler(config, folder, shape, end_token_id=dialog.end_token_id)) as sampler,
        open_executor(config.executor) as executor,
    ):
        require_validators(problems, executor)
        sampler.push(weights.items(), version=0)
        yield _Model(
            sampler=sampler,
            executor=executor,
            dialog=dialog,
            rollout=config.rollout,
            unrelated=unrelated_feedback(problems, config.rollout),
        )


@contextmanager
def _transcribed_model(config: Config, problems: Sequence[Problem]) -> Iterator[Play[Transcript]]:
    with _model(config, problems) as model:
        yield model.transcripts


@contextmanager
def _server(config: Config, problems: Sequence[Problem]) -> Iterator[Play[Transcript]]:
    with closing(ChatServer(config.server)) as server, open_executor(config.executor) as executor:
        require_validators(problems, executor)
        yield functools.partial(
            collect_served,
            server=server,
            executor=executor,
            settings=config.rollout,
            examples=read_examples(config.rollout.few_shot),
            unrelated=unrelated_feedback(problems, config.rollout),
        )


def export_policy(config: Config, folder: RunFolder, output: Path, *, dtype: str, max_file_bytes: int) -> int:
    """Write the policy of a checkpoint of any layout as a Hugging Face folder, in this process alone.

    `dtype` is a name of torch's, or "source": each tensor in the type that it had in the model that the run
    started from. Weights are read one after the other and written `max_file_bytes` at a time.
    """
    source = model_folder(config.model.path)
    start = StoredWeights(source)
    store = CheckpointStore(folder.checkpoints, keep=1)
    checkpoint = store.load(folder.checkpoint) if folder.checkpoint else store.load_latest()
    if checkpoint is None:
        raise ConfigError(f"{folder.path} has no checkpoint yet; let the run save one first")
    types = {
        name: stored.dtype if dtype == SOURCE else getattr(torch, dtype) for name, stored in start.items()
    }
    named = _weights_of(checkpoint.states["policy"], read_shape(source))
    typed = ((name, tensor.to(types[name])) for name, tensor in named)
    write_weights(output, typed, max_file_bytes=max_file_bytes)
    for name in _OTHER_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, output / name)
    config_json = read_config(source)
    write_config(output, config_json if dtype == SOURCE else with_dtype(config_json, dtype))
    return 0


def _weights_of(policy: State, shape: ModelShape) -> Iterator[tuple[str, Tensor]]:
    """Whole weights in float32 under their Hugging Face names."""
    for weight in stage_weights(shape, "logits", stage=0, stages=1):
        for name, size in zip(weight.names, weight.shapes, strict=True):
            whole = torch.empty(size)
            policy.read([Piece(name=f"weight/{name}", offsets=(0,) * len(size), data=whole)])
            yield name, whole
