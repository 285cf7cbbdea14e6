"""What a network on megatron-core learns with: gradient buffers, optimiser and schedule."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from rlef import megatron_cpu
from rlef.config import OptimizerConfig
from rlef.moments import MOMENTS, set_steps, steps_made

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message=".*Apex (are|is) not installed")  # as in megatron_policy.py
    from megatron.core import parallel_state as mpu
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
    from megatron.core.optimizer import get_megatron_optimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
    from megatron.core.transformer import TransformerConfig


class Training:
    """Gradient buffers, optimiser and schedule of a network that learns."""

    def __init__(
        self,
        config: TransformerConfig,
        chunks: Sequence[nn.Module],
        optimizer: OptimizerConfig,
        lr: float,
        *,
        sharded: bool,
    ) -> None:
        """`sharded`: each data-parallel rank keeps moments of, and steps, its part of the parameters."""
        self.sharded = sharded
        self.has_masters = config.bf16  # the optimiser keeps fp32 copies of the weights, and steps those
        buffers = DistributedDataParallelConfig(
            use_distributed_optimizer=sharded,
            grad_reduce_in_fp32=True,  # and added up over micro-batches
        )
        self.chunks = [DistributedDataParallel(config, buffers, chunk) for chunk in chunks]
        parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
        self._device = parameters[0].device
        later = [chunk.no_sync for chunk in self.chunks]
        config.no_sync_func = later if len(later) > 1 else later[0]
        config.finalize_model_grads_func = add_up_gradients
        self._clip_grad = optimizer.clip_grad
        settings = MegatronOptimizerConfig(
            optimizer="adam",
            lr=lr,
            min_lr=lr,
            weight_decay=optimizer.weight_decay,
            adam_beta1=optimizer.beta1,
            adam_beta2=optimizer.beta2,
            adam_eps=optimizer.eps,
            use_distributed_optimizer=sharded,
            bf16=config.bf16,
            params_dtype=config.params_dtype,
        )
        with megatron_cpu.type_names_of_cuda(parameters):
            self._optimizer = get_megatron_optimizer(settings, self.chunks, use_gloo_process_groups=False)
        (only,) = self._optimizer.chained_optimizers  # there would be another for experts
        self._own = only
        # It also keeps weight decay from the norms: parameter groups only have marks, on which it acts.
        self._schedule = OptimizerParamScheduler(
            self._optimizer,
            init_lr=0.0,
            max_lr=lr,
            min_lr=lr,
            lr_warmup_steps=optimizer.warmup_updates,
            lr_decay_steps=optimizer.warmup_updates + 1,
            lr_decay_style="constant",
            start_wd=optimizer.weight_decay,
            end_wd=optimizer.weight_decay,
            wd_incr_steps=1,
            wd_incr_style="constant",
        )

    @property
    def learning_rate(self) -> float:
        rate: float = self._optimizer.param_groups[0]["lr"]
        return rate

    def zero_gradients(self) -> None:
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self._optimizer.zero_grad()

    def step(self) -> float:
        """Clip and step; returns the norm of the whole gradient before clipping. Not finite: no step.

        In megatron's own step a NaN passes for a gradient that needs no clipping, hence these lines.
        """
        self._schedule.step(1)  # first, so that the first update has a rate
        self._optimizer.prepare_grads()
        grad_norm = self._grad_norm()
        if math.isfinite(grad_norm):
            nn.utils.clip_grads_with_norm_(
                self._own.get_parameters(), self._clip_grad, torch.tensor(grad_norm)
            )
            self._optimizer.step_with_ready_grads()
        return grad_norm

    def _grad_norm(self) -> float:
        """Over all shards. What several ranks hold, counts once."""
        gradients = self._own.get_main_grads_for_grad_norm()
        squared = nn.utils.get_total_norm(gradients).to(self._device).square()
        everyone = None
        torch.distributed.all_reduce(
            squared, group=everyone if self.sharded else mpu.get_model_parallel_group()
        )
        return math.sqrt(squared.item())

    def counted(self) -> dict[str, int]:
        """Updates, and of them the steps, which a gradient that is not finite leaves out."""
        return {"updates": self._schedule.num_steps, "steps": steps_made(self._own.optimizer)}

    def set_counted(self, facts: Mapping[str, Any]) -> None:
        """Go on from there, with moments of zero for `kept_of` to give."""
        self._schedule.num_steps = facts["updates"]
        set_steps(self._own.optimizer, facts["steps"])

    def kept_of(self, parameter: nn.Parameter) -> Iterator[tuple[str, Tensor, int]]:
        """What the optimiser keeps on this rank: its kind, the numbers, flat, and which of the parameter's
        is the first."""
        stepped, begin = parameter, 0
        if self.sharded:
            if parameter not in self._own.model_param_gbuf_map:
                return  # another replica's
            begin = self._own._get_model_param_range_map(parameter)["param"].start  # noqa: SLF001
            group, place = self._own.model_param_group_index_map[parameter]
            stepped = self._own.optimizer.param_groups[group]["params"][place]
        elif self.has_masters:
            stepped = parameter.main_param  # type: ignore[attr-defined]  # megatron's
        if self.has_masters:
            yield "weight", stepped.detach().view(-1), begin
        state = self._own.optimizer.state.get(stepped, {})
        for moment in MOMENTS:
            if moment in state:
                yield moment, state[moment].view(-1), begin


def add_up_gradients(chunks: list[nn.Module], _tokens: Tensor, **groups: Any) -> None:
    """All-reduce. A loss is normalised over the whole update already, so nothing is divided by anything.

    With `calculate_per_token_loss` megatron divides neither by the number of micro-batches nor by the number
    of data-parallel ranks, but by the number of tokens: here that is withheld.
    """
    finalize_model_grads(chunks, **groups)
