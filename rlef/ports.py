"""The two doors behind which engines stand, something that samples and something that learns; and how an
evaluation plays dialogs, whatever samples them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from rlef.config import FeedbackKind
from rlef.pieces import HeldState, State
from rlef.records import Batch, Problem

Dialog_co = TypeVar("Dialog_co", covariant=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to draw a response. `temperature` 0 means the most probable token."""

    temperature: float
    top_p: float
    max_tokens: int
    seed: int


class Play(Protocol[Dialog_co]):
    """One dialog per problem, in their order, as an `Episode` or a `Transcript`; `numbers` key their random
    numbers. Where a job has several processes it is collective: all call it, and get all dialogs."""

    def __call__(
        self,
        problems: Sequence[Problem],
        *,
        numbers: Sequence[int],
        params: SamplingParams,
        turns: int,
        feedback: FeedbackKind,
    ) -> Sequence[Dialog_co]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One response to sample, after `token_ids`.

    `stream` keys the random numbers: those for the token at absolute position p of the dialog are a function
    of (seed, stream, p), and on vLLM of where the request ends, so a response does not depend on what it was
    batched with.

    To go on with a response that was begun, its `num_sampled` tokens stand at the end of `token_ids`; they
    count towards the most tokens, and are not given again.
    """

    stream: int
    token_ids: Sequence[int]
    num_sampled: int = 0


UNFINISHED = ""
"""The finish reason of a response that was aborted before its end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """A sampled continuation. It ends with the end-of-turn token if `finish_reason` is "stop"."""

    token_ids: list[int]  # [response tokens]
    logprobs: list[float]  # [response tokens] after temperature and top-p
    finish_reason: str  # "stop", "length" or UNFINISHED
    versions: list[int]  # [response tokens] of the weights that sampled each


@dataclass(slots=True, eq=False)
class Draft:
    """A response under way, in the sampler's hands."""

    request: Request
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    finish_reason: str = UNFINISHED

    def response(self) -> Response:
        return Response(
            token_ids=self.token_ids,
            logprobs=self.logprobs,
            versions=self.versions,
            finish_reason=self.finish_reason,
        )


class Sampler(Protocol):
    """Decodes with the policy's weights. Token ids in, token ids out."""

    def generate(self, requests: Sequence[Request], params: SamplingParams) -> list[Response]:
        """Responses in the order of `requests`. Only while nothing submitted is under way."""
        ...

    def push(self, named_weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Replace the weights; names and shapes are those of the Hugging Face checkpoint.

        What is under way goes on with them, from its next token on, and keeps what it has.
        """
        ...

    def close(self) -> None:
        """Give back what the engine holds. Nothing may be called afterwards."""
        ...


class StreamingSampler(Sampler, Protocol):
    """A sampler that takes requests one by one while others are under way."""

    def submit(self, request: Request, params: SamplingParams) -> None:
        """Queue a request; no other under way has its `stream`, and all have the same `params`."""
        ...

    def step(self) -> list[tuple[int, Response]]:
        """Sample at least one more token for what is under way; (stream, response) of what has finished."""
        ...

    def abort(self) -> list[tuple[int, Response]]:
        """Forget all that is under way; (stream, the response so far) of each."""
        ...


def generate_by_steps(
    sampler: StreamingSampler, requests: Sequence[Request], params: SamplingParams
) -> list[Response]:
    """`Sampler.generate`, by the other methods. Nothing is under way before it, nor after a fault."""
    order = {request.stream: index for index, request in enumerate(requests)}
    responses: dict[int, Response] = {}
    try:
        for request in requests:
            sampler.submit(request, params)
        while len(responses) < len(requests):
            responses |= {order[stream]: response for stream, response in sampler.step()}
    finally:
        sampler.abort()
    return [responses[index] for index in range(len(requests))]


class LossFunction(Protocol):
    """(outputs, index of the micro-batch) -> (summed loss, statistics).

    `outputs` are a policy's logits `[tokens, vocab / tensor parallel size]` or a value network's values
    `[values]`. The loss must already be divided by whatever it is normalised by over the *whole* update (all
    micro-batches, all data-parallel ranks): engines add micro-batches and ranks up and divide by nothing.
    Statistics go together as in `combine_statistics`.

    `rows` is given by an engine whose ranks hold some of a pack's tokens each: the tokens, ascending, that
    the rows of the logits belong to. The loss is then of what those rows predict, and engines add up.
    """

    def __call__(
        self, outputs: Tensor, index: int, rows: Tensor | None = None, /
    ) -> tuple[Tensor, dict[str, Tensor]]: ...


def combine_statistics(items: Iterable[Mapping[str, Tensor | float]]) -> dict[str, float]:
    """Sums by name, except that of those whose name ends in `_max` the largest is kept."""
    combined: dict[str, float] = {}
    for item in items:
        for name, value in item.items():
            if name not in combined:
                combined[name] = float(value)
            elif name.endswith("_max"):
                combined[name] = max(combined[name], float(value))
            else:
                combined[name] += float(value)
    return combined


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateStats:
    """The outcome of one optimiser step, equal on every rank."""

    statistics: dict[str, float]
    grad_norm: float  # before clipping
    learning_rate: float
    skipped: bool  # the gradient was not finite, so the weights did not move


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelState:
    """This process's place in the job."""

    rank: int
    world_size: int
    data_parallel_rank: int
    data_parallel_size: int
    data_parallel_group: ProcessGroup | None  # None when there is one process
    tensor_parallel_group: ProcessGroup | None  # None when the vocabulary is not split
    tensor_parallel_rank: int
    pipeline_rank: int  # it holds this stage, or of an interleaved pipeline the first of several
    copy_rank: int  # of the ranks that hold the same weights: those of data and of context parallelism
    device: torch.device  # where the networks live, and so every tensor of a collective


class Network(Protocol):
    """One trainable (or frozen) network. Micro-batches are this data-parallel rank's own."""

    def forward(self, micro_batches: Sequence[Batch]) -> list[Tensor]:
        """No gradient. A policy: log-prob of each token `[tokens]`, 0 outside the response mask.

        A value network: `[values]`. On every rank of the model-parallel group, float32.
        """
        ...

    def update(self, micro_batches: Sequence[Batch], loss: LossFunction) -> UpdateStats:
        """Forward, backward, all-reduce, clip, one optimiser step."""
        ...

    def named_weights(self) -> Iterable[tuple[str, Tensor]]:
        """The whole weights under Hugging Face names, on every rank (collective)."""
        ...

    def stage_weights(self) -> Iterable[Tensor]:
        """The whole weights of this rank's stages, in `weights.stage_buckets`, flat (collective over its
        tensor parallel ranks)."""
        ...

    def state_dict(self) -> HeldState:
        """This rank's part of weights, optimiser and schedule, as pieces of whole tensors.

        They go on under `weight/`, `exp_avg/` and `exp_avg_sq/` and the Hugging Face name, so that a network
        in another layout, or of another engine, can take them up; in the same layout bit for bit.
        """
        ...

    def load_state_dict(self, state: State) -> None:
        """Continue from there. Raises ValueError if it is of another network, and then nothing was loaded."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Networks:
    """What an engine builds: the learning policy, its frozen start, and perhaps the value network."""

    policy: Network
    reference: Network
    value: Network | None
    parallel: ParallelState

    def trained(self) -> dict[str, Network]:
        """Those that learn, under their names in a checkpoint."""
        return {"policy": self.policy} | ({} if self.value is None else {"value": self.value})
