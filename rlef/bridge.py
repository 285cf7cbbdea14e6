"""What joins processes that learn with processes that only sample.

Rank 0 gives orders, and every sampler carries out all of them in turn. An order is a word in the job's store
(`words.py`); what is large travels by collectives, which begin when all who take part have come to them: so a
wait that may be long is one that names whom it is for, and ends when that one is gone.

Weights go bucket by bucket from one rank of each pipeline stage to all samplers at once, each rank of an
engine included. Episodes go from each engine's leader to rank 0, and from there to the learners.
"""

from __future__ import annotations

import itertools
import json
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rlef.config import Config
from rlef.job import Job, within
from rlef.ports import ParallelState
from rlef.records import ModelShape
from rlef.weights import BUCKET_ELEMENTS, bucket_size, stage_buckets, unpack
from rlef.words import Words


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What the samplers are to do, with its details."""

    number: int  # from 1
    kind: str
    details: Mapping[str, Any]


class _Bridge:
    """What both ends have: words, and the groups that a process is in."""

    def __init__(self, job: Job, config: Config, words: Words) -> None:
        self._job = job
        self._config = config
        self._words = words
        self._number = 0  # of the last order
        self._weights: dict[int, Any] = {}  # by pipeline rank: one that holds its stages, then the samplers
        self._replies: Any = None  # rank 0, then the leaders

    def _join(self, name: str, rank: int, others: range, *, of_tensors: bool = False) -> Any:
        """A group of one learner, its rank 0, and of the samplers `others`. All call it at the same time.

        torch.distributed makes groups of its default group only, and that does not hold both ends: this is a
        backend of it, without the front.
        """
        store = within(self._job.store, name)
        size, timeout = 1 + len(others), timedelta(seconds=self._config.parallel.timeout_s)
        if of_tensors and self._job.device.type == "cuda":
            return dist.ProcessGroupNCCL(store, rank, size, timeout)  # type: ignore[arg-type]  # an overload
        return dist.ProcessGroupGloo(store, rank, size, timeout)

    def _send(self, what: object, to: int) -> None:
        send_object(what, lambda data: self._replies.send([data], to, 0))

    def _receive(self, source: int) -> Any:
        return receive_object(lambda data: self._replies.recv([data], source, 0))

    def _wait_for_rank_0(self, field: str) -> None:
        """Until it has come to the present order."""
        self._words.wait(
            [0],
            lambda word: getattr(word, field) >= self._number,
            limit_s=self._config.rollout.timeout_s,
            limit="rollout.timeout_s",
        )


class LearnersEnd(_Bridge):
    """The end of a learner. Every method is collective over the learners."""

    def __init__(self, job: Job, config: Config, words: Words, state: ParallelState) -> None:
        super().__init__(job, config, words)
        self.is_first = job.rank == 0
        sends = state.copy_rank == state.tensor_parallel_rank == 0
        self._order("meet")
        self._wait_until_ready()
        if self.is_first:
            self._replies = self._join("replies", 0, job.leaders)
        if sends:
            source = state.pipeline_rank
            self._weights[source] = self._join(f"weights {source}", 0, job.samplers, of_tensors=True)
        self._in_replica = state.copy_rank == 0

    def send_weights(self, buckets: Iterable[Tensor], *, version: int) -> None:
        """`buckets` are those of this process's stages, as `Network.stage_weights` gives them."""
        remaining = iter(buckets) if self._in_replica else iter(())
        first = list(itertools.islice(remaining, 1))  # rank 0 has one, which shows the type of all
        dtypes = [str(flat.dtype).removeprefix("torch.") for flat in first]
        self._order("load", version=version, dtype=next(iter(dtypes), ""))
        self._wait_until_ready()
        for flat in itertools.chain(first, remaining):
            for group in self._weights.values():
                group.broadcast(flat, 0).wait()

    def ask(self, kind: str, **details: Any) -> list[Any]:
        """What each engine's leader replies to an order, in their order; the same on all learners."""
        self._order(kind, **details)
        self._wait_until_ready(self._config.rollout.timeout_s, "rollout.timeout_s")
        replies: list[Any] = [None]
        if self.is_first:
            replies = [[self._receive(1 + index) for index in range(len(self._job.leaders))]]
        if self._job.learners > 1:
            dist.broadcast_object_list(replies, src=0)
        answered: list[Any] = replies[0]
        return answered

    def tell(self, kind: str, what: object = None, **details: Any) -> None:
        """An order without a reply, which may hand out something large."""
        self._order(kind, **details)
        self._wait_until_ready()
        if self.is_first and what is not None:
            for index in range(len(self._job.leaders)):
                self._send(what, 1 + index)

    def samplers_want_to_stop(self) -> bool:
        """As far as this process knows."""
        words = [self._words.heard(rank) for rank in self._job.samplers]
        return any(word is not None and word.wants_to_stop for word in words)

    def name_of(self, index: int) -> str:
        """The process that gives reply number `index`; with its host on rank 0, which hears from it."""
        rank = self._job.leaders[index]
        word = self._words.heard(rank)
        return f"rank {rank}" + (f" on {word.host}" if word is not None else "")

    def _order(self, kind: str, **details: Any) -> None:
        self._number += 1
        if self.is_first:
            self._words.say(given=self._number, order=json.dumps({"kind": kind, "details": details}))

    def _wait_until_ready(self, limit_s: int | None = None, limit: str = "parallel.timeout_s") -> None:
        """Until all samplers have come to the order, or have carried it out, if they reply."""
        if not self.is_first:
            self._wait_for_rank_0("done")
            return
        self._words.wait(
            self._job.samplers,
            lambda word: word.done >= self._number,
            limit_s=limit_s or self._config.parallel.timeout_s,
            limit=limit,
        )
        self._words.say(done=self._number)


class SamplersEnd(_Bridge):
    """The end of a process that only samples. `on_ready` is called when it says that it has come to an order
    without weights: a leader tells its engine."""

    def __init__(
        self,
        job: Job,
        config: Config,
        words: Words,
        shape: ModelShape,
        on_ready: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(job, config, words)
        self._shape = shape
        self._on_ready = on_ready
        self.next_order()
        self._say_ready()
        self._wait_for_rank_0("done")
        own = 1 + job.samplers.index(job.rank)
        if job.rank in job.leaders:
            self._replies = self._join("replies", 1 + job.leaders.index(job.rank), job.leaders)
        self._stages = config.parallel.pipeline * config.parallel.virtual_pipeline
        for source in range(config.parallel.pipeline):
            self._weights[source] = self._join(f"weights {source}", own, job.samplers, of_tensors=True)

    def next_order(self) -> Order:
        """Wait for it. It is answered by one of the other methods."""
        self._number += 1
        self._wait_for_rank_0("given")
        word = self._words.heard(0)
        assert word is not None
        assert word.given == self._number, "rank 0 goes on when all have come to an order"
        return Order(number=self._number, **json.loads(word.order))

    def ready(self) -> None:
        """Say that this process has come to the present order."""
        if self._on_ready is not None:
            self._on_ready()
        self._say_ready()

    def reply(self, what: object) -> None:
        """The answer to the present order, for `LearnersEnd.ask`."""
        self.ready()
        self._send(what, 0)

    def take(self) -> Any:
        """What the present order hands out."""
        self.ready()
        return self._receive(0)

    def weights(self, dtype: str, *, bucket_elements: int = BUCKET_ELEMENTS) -> Iterator[tuple[str, Tensor]]:
        """The whole weights under Hugging Face names, as they arrive. To be read to the end."""
        self._say_ready()
        for stage in range(self._stages):
            group = self._weights[stage % len(self._weights)]  # rank by rank, round after round
            buckets = stage_buckets(
                self._shape, "logits", stage=stage, stages=self._stages, elements=bucket_elements
            )
            for bucket in buckets:
                flat = torch.empty(bucket_size(bucket), dtype=getattr(torch, dtype), device=self._job.device)
                group.broadcast(flat, 0).wait()
                yield from unpack(flat, bucket)

    def _say_ready(self) -> None:
        self._words.say(done=self._number)


def send_object(what: object, send: Callable[[Tensor], Any]) -> None:
    """Pickled, as torch.distributed sends objects: its size and its bytes, each by one `send`."""
    data = torch.frombuffer(bytearray(pickle.dumps(what)), dtype=torch.uint8)
    send(torch.tensor([data.numel()])).wait()
    send(data).wait()


def receive_object(receive: Callable[[Tensor], Any]) -> Any:
    """What `send_object` sends at the other end. It is of this job: unpickling runs what it says."""
    size = torch.empty(1, dtype=torch.int64)
    receive(size).wait()
    data = torch.empty(int(size), dtype=torch.uint8)
    receive(data).wait()
    return pickle.loads(data.numpy().tobytes())  # noqa: S301
