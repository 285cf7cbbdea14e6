"""One sampler's engine over several processes: the first of them leads, the others follow.

Each holds its part of the model in an engine of its own, and what these compute they compute together, by
collectives: so all of them make the same calls in the same order, and get the same tokens, which they draw by
the same seeds. The leader has the episodes. It tells each call to its followers before it makes it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from threading import Lock
from typing import Any
from zlib import crc32

import torch.distributed as dist
from torch import Tensor

from rlef.bridge import Order, SamplersEnd, receive_object, send_object
from rlef.config import Config
from rlef.faults import CONTINUES, RunFault, lost_another
from rlef.job import Job, within
from rlef.ports import Request, Response, SamplingParams, StreamingSampler
from rlef.words import Words


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """Of a method of the engine, or what else a leader has come to."""

    name: str
    arguments: tuple[Any, ...] = ()
    given: int = 0  # `_Engine.given` of the leader before it


class Calls:
    """The way from the leader of this process's engine to its followers. All of them make it together."""

    def __init__(self, job: Job, config: Config, words: Words) -> None:
        self.leads = job.rank in job.leaders
        self.leader = job.engine[0]
        self.is_ending = False  # set by the leader: nothing is ordered any more
        self._limit_s = config.parallel.timeout_s
        self._words = words
        self._others = [rank for rank in job.engine if rank != job.rank] if self.leads else [self.leader]
        self._lock = Lock()  # orders are told by one thread, and the engine may be called by another
        # While programs run, or learners learn, nothing is called: rank 0 bounds that by rollout.timeout_s.
        timeout = timedelta(seconds=config.rollout.timeout_s + config.parallel.timeout_s)
        store, place = within(job.store, f"engine from {self.leader}"), job.engine.index(job.rank)
        self._group: Any = dist.ProcessGroupGloo(store, place, len(job.engine), timeout)

    def tell(self, name: str, *arguments: object, given: int = 0) -> None:
        """Returns when all followers have begun to read it: they have made all calls before it.

        Raises:
            RunFault: what ended a follower.
        """
        call = Call(name=name, arguments=arguments, given=given)
        with self._lock, self.naming_the_lost():
            send_object(call, lambda data: self._group.broadcast(data, 0))

    def receive(self) -> Call:
        """The leader's next call.

        Raises:
            RunFault: what ended the leader.
        """
        with self.naming_the_lost():
            call: Call = receive_object(lambda data: self._group.broadcast(data, 0))
        return call

    def close(self) -> None:
        """The leader's end. Where a fault ends its process, followers hear of that instead."""
        if self.is_ending:
            self.tell("close")

    @contextmanager
    def naming_the_lost(self) -> Iterator[None]:
        """A lost connection says little: raise, as RunFault, what ended the process at its other end."""
        try:
            yield
        except Exception as error:
            if lost_another(error):
                self._words.wait(
                    self._others, lambda _: False, limit_s=self._limit_s, limit="parallel.timeout_s"
                )
            raise


class _Engine:
    """This rank's part of it, called by name."""

    def __init__(self, part: StreamingSampler, calls: Calls) -> None:
        self._part = part
        self._calls = calls
        self.given = 0  # a number made of all tokens that it has given so far

    def make(self, name: str, *arguments: Any) -> Any:
        with self._calls.naming_the_lost():
            result = getattr(self._part, name)(*arguments)
        responses = [each if isinstance(each, Response) else each[1] for each in result or ()]
        self.given = crc32(repr([response.token_ids for response in responses]).encode(), self.given)
        return result


class LeadingSampler:
    """`ports.StreamingSampler`: the whole engine, in the hands of its leader."""

    def __init__(self, part: StreamingSampler, calls: Calls) -> None:
        self._engine = _Engine(part, calls)
        self._part = part
        self._calls = calls

    def generate(self, requests: Sequence[Request], params: SamplingParams) -> list[Response]:
        responses: list[Response] = self._together("generate", list(requests), params)
        return responses

    def submit(self, request: Request, params: SamplingParams) -> None:
        self._together("submit", request, params)

    def step(self) -> list[tuple[int, Response]]:
        finished: list[tuple[int, Response]] = self._together("step")
        return finished

    def abort(self) -> list[tuple[int, Response]]:
        begun: list[tuple[int, Response]] = self._together("abort")
        return begun

    def push(self, named_weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """`named_weights` are this rank's. The others take them from where they come to all."""
        self._calls.tell("push", version, given=self._engine.given)
        self._engine.make("push", named_weights, version)

    def close(self) -> None:
        """This rank's part."""
        self._part.close()

    def _together(self, name: str, *arguments: object) -> Any:
        self._calls.tell(name, *arguments, given=self._engine.given)
        return self._engine.make(name, *arguments)


class Follower:
    """Makes the calls that the leader tells."""

    def __init__(self, part: StreamingSampler, calls: Calls, bridge: SamplersEnd) -> None:
        self._engine = _Engine(part, calls)
        self._calls = calls
        self._bridge = bridge

    def follow(self, order: Order) -> bool:
        """As long as the leader carries out `order`, and until it has the next one; whether there is one.

        Raises:
            RunFault: the leader is gone, or has got other tokens than this rank.
        """
        while True:
            call = self._calls.receive()
            match call.name:
                case "order":
                    return True
                case "close":
                    return False
                case "ready":
                    self._bridge.ready()
                case "push":
                    self._make(call, self._bridge.weights(order.details["dtype"]))
                case _:
                    self._make(call)

    def _make(self, call: Call, *own: object) -> None:
        if call.given != self._engine.given:
            raise RunFault(
                f"this rank has not sampled what rank {self._calls.leader}, which leads its engine, has: the "
                "ranks of one engine must compute alike; look whether their GPUs and packages are equal, or "
                f"set vllm.tensor_parallel=1; {CONTINUES}"
            )
        self._engine.make(call.name, *own, *call.arguments)
