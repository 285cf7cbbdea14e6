"""Commands that need only a part of a training run: evaluate a model folder, export a run's policy."""

from __future__ import annotations

import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

from rlef import problems as sources
from rlef.checkpoint import CheckpointStore
from rlef.config import Config, ConfigError
from rlef.evaluate import evaluate, summarise
from rlef.megatron_policy import build_networks, leave
from rlef.pretrained import model_folder, read_pretrained, read_token_ids, write_pretrained
from rlef.prompts import Dialog
from rlef.rollout import collect
from rlef.run_folder import RunFolder
from rlef.samplers import build_sampler
from rlef_sandbox import Executor

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "dialog.json")


def evaluate_model(config: Config) -> dict[str, Any]:
    """The four conditions on `problems.eval`, in this process alone; figures as in `summary.json`."""
    folder = model_folder(config.model.path)
    shape, weights = read_pretrained(folder)
    dialog = Dialog.read(folder, config.rollout)
    with (
        closing(build_sampler(config, folder, shape, end_token_id=dialog.end_token_id)) as sampler,
        Executor(
            workers=config.executor.workers or None,
            allow_missing=config.executor.allow_missing,
            memory_cgroup=config.executor.memory_cgroup or None,
        ) as executor,
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


def export_policy(config: Config, folder: RunFolder, output: Path) -> int:
    """Write the policy of a checkpoint as a Hugging Face folder; every process of the run's layout calls
    this."""
    source = model_folder(config.model.path)
    shape, weights = read_pretrained(source)
    networks = build_networks(shape, weights, parallel=config.parallel, optimizer=config.optimizer)
    store = CheckpointStore.of_run(folder.checkpoints, config, networks.parallel)
    checkpoint = store.load(folder.checkpoint) if folder.checkpoint else store.load_latest()
    if checkpoint is None:
        raise ConfigError(f"{folder.path} has no checkpoint yet; let the run save one first")
    networks.policy.load_state_dict(checkpoint.rank_state["policy"])
    exported = dict(networks.policy.named_weights())
    if networks.parallel.rank == 0:
        end_token_id, pad_token_id = read_token_ids(source)
        write_pretrained(output, shape, exported, end_token_id=end_token_id, pad_token_id=pad_token_id)
        for name in _TOKENIZER_FILES:
            if (source / name).exists():
                shutil.copyfile(source / name, output / name)
    leave()
    return 0
