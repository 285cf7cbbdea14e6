"""Commands that need only a part of a training run: evaluate a model folder, export a run's policy."""

from __future__ import annotations

import shutil
from collections import deque
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from rlef import problems as sources
from rlef.checkpoint import CheckpointStore
from rlef.config import Config, ConfigError
from rlef.evaluate import evaluate, summarise
from rlef.execution import open_executor
from rlef.families import read_config, read_shape, with_dtype
from rlef.megatron_policy import build_policy, leave
from rlef.pretrained import StoredWeights, model_folder, read_pretrained, write_config, write_weights
from rlef.prompts import Dialog
from rlef.rollout import collect
from rlef.run_folder import RunFolder
from rlef.samplers import build_sampler

SOURCE = "source"
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
    folder = model_folder(config.model.path)
    shape, weights = read_pretrained(folder)
    dialog = Dialog.read(folder, config.rollout)
    with (
        closing(build_sampler(config, folder, shape, end_token_id=dialog.end_token_id)) as sampler,
        open_executor(config.executor) as executor,
    ):
        sampler.push(weights.items(), version=0)
        evaluation = evaluate(
            sources.load(config, "eval"),
            rollouts=lambda problems, **settings: (
                collect(
                    problems,
                    sampler=sampler,
                    executor=executor,
                    dialog=dialog,
                    settings=config.rollout,
                    **settings,
                ).episodes
            ),
            config=config,
        )
    return summarise(evaluation)


def export_policy(config: Config, folder: RunFolder, output: Path, *, dtype: str, max_file_bytes: int) -> int:
    """Write the policy of a checkpoint as a Hugging Face folder; every process of the run's layout calls
    this.

    `dtype` is a name of torch's, or "source": each tensor in the type that it had in the model that the run
    started from. The first process writes the weights as they arrive, `max_file_bytes` at a time.
    """
    source = model_folder(config.model.path)
    shape, start = read_shape(source), StoredWeights(source)
    policy, state = build_policy(shape, start, parallel=config.parallel, optimizer=config.optimizer)
    store = CheckpointStore.of_run(folder.checkpoints, config, state)
    checkpoint = store.load(folder.checkpoint) if folder.checkpoint else store.load_latest()
    if checkpoint is None:
        raise ConfigError(f"{folder.path} has no checkpoint yet; let the run save one first")
    policy.load_state_dict(checkpoint.rank_state["policy"])
    named = policy.named_weights()
    if state.rank == 0:
        types = {
            name: stored.dtype if dtype == SOURCE else getattr(torch, dtype) for name, stored in start.items()
        }
        typed = ((name, tensor.to(types[name])) for name, tensor in named)
        write_weights(output, typed, max_file_bytes=max_file_bytes)
        for name in _OTHER_FILES:
            if (source / name).exists():
                shutil.copyfile(source / name, output / name)
        config_json = read_config(source)
        write_config(output, config_json if dtype == SOURCE else with_dtype(config_json, dtype))
    else:
        deque(named, maxlen=0)  # gathering is collective
    leave()
    return 0
