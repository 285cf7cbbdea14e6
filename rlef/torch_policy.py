"""`ports.Network` in plain torch and one process: the obvious twin that the Megatron policy is tested
against."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from rlef.config import OptimizerConfig
from rlef.losses import token_logprobs
from rlef.moments import MOMENTS, set_steps, steps_made
from rlef.pieces import HeldState, Piece, State, require_same_network
from rlef.ports import LossFunction, UpdateStats, combine_statistics
from rlef.records import Batch
from rlef.shards import Head
from rlef.torch_model import LlamaModel
from rlef.weights import stage_buckets


class TorchNetwork:
    """A `LlamaModel` with AdamW. Without `optimizer` it is frozen (the reference policy)."""

    def __init__(
        self, model: LlamaModel, *, lr: float = 0.0, optimizer: OptimizerConfig | None = None
    ) -> None:
        self._model = model
        self._settings = optimizer
        self._lr = lr
        self._updates = 0
        if optimizer is not None:
            matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
            vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
            groups = [
                {"params": matrices, "weight_decay": optimizer.weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ]
            betas = (optimizer.beta1, optimizer.beta2)
            self._optimizer = torch.optim.AdamW(groups, lr=lr, betas=betas, eps=optimizer.eps)

    @torch.no_grad()
    def forward(self, micro_batches: Sequence[Batch]) -> list[Tensor]:
        return [self._score(batch) for batch in micro_batches]

    def update(self, micro_batches: Sequence[Batch], loss: LossFunction) -> UpdateStats:
        if self._settings is None:
            raise ValueError("a frozen network cannot be updated; build it with an optimizer")
        settings = self._settings
        self._optimizer.zero_grad()
        statistics: list[dict[str, Tensor]] = []
        for index, batch in enumerate(micro_batches):
            loss_sum, stats = loss(self._outputs(batch), index)
            loss_sum.backward()  # type: ignore[no-untyped-call]
            statistics.append({name: value.detach() for name, value in stats.items()})
        parameters = list(self._model.parameters())
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, settings.clip_grad)
        lr = self._lr * min(1.0, (self._updates + 1) / max(1, settings.warmup_updates))
        skipped = not bool(torch.isfinite(grad_norm))
        if not skipped:
            for group in self._optimizer.param_groups:
                group["lr"] = lr
            self._optimizer.step()
        self._updates += 1
        return UpdateStats(
            statistics=combine_statistics(statistics),
            grad_norm=float(grad_norm),
            learning_rate=lr,
            skipped=skipped,
        )

    def named_weights(self) -> Iterable[tuple[str, Tensor]]:
        return [(name, tensor.detach()) for name, tensor in self._model.state_dict().items()]

    def stage_weights(self) -> Iterator[Tensor]:
        named = dict(self.named_weights())
        head: Head = "value" if self._model.head == "value" else "logits"
        for bucket in stage_buckets(self._model.shape, head, stage=0, stages=1):
            yield torch.cat([named[name].flatten() for weight in bucket for name in weight.names])

    def state_dict(self) -> HeldState:
        counted = {}
        if self._settings is not None:
            counted = {"updates": self._updates, "steps": steps_made(self._optimizer)}
        return HeldState(facts=self._facts() | counted, pieces=list(self._pieces()))

    def load_state_dict(self, state: State) -> None:
        require_same_network(state.facts, self._facts())
        if self._settings is not None:
            self._updates = state.facts["updates"]
            set_steps(self._optimizer, state.facts["steps"])
        state.read(self._pieces())

    def _facts(self) -> dict[str, Any]:
        return {
            **asdict(self._model.shape),
            "head": self._model.head,
            "trained": self._settings is not None,
        }

    def _pieces(self) -> Iterator[Piece]:
        for name, weight in self._model.named_parameters():
            kept = {"weight": weight.detach()}
            if self._settings is not None:
                kept |= {moment: self._optimizer.state[weight][moment] for moment in self._moments(weight)}
            for kind, whole in kept.items():
                yield Piece(name=f"{kind}/{name}", offsets=(0,) * whole.ndim, data=whole)

    def _moments(self, weight: nn.Parameter) -> Sequence[str]:
        return MOMENTS if weight in self._optimizer.state else ()

    def _outputs(self, batch: Batch) -> Tensor:
        outputs: Tensor = self._model(batch.token_ids, batch.position_ids, batch.cu_seqlens)
        return outputs[batch.value_positions] if self._model.head == "value" else outputs

    def _score(self, batch: Batch) -> Tensor:
        outputs = self._outputs(batch)
        return outputs if self._model.head == "value" else token_logprobs(outputs, batch)
