"""The processes of one job, and which of them learn and which sample.

Colocated, each process does both. Disaggregated, the last `parallel.sampling_processes` only sample, and so
many that follow each other have one engine together. Megatron and vLLM take torch.distributed's default group
for all there are, so that group is the learners' alone, or one engine's. What joins learners and samplers is
made on the job's store (`bridge.py`).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from rlef.config import ParallelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """This process's place in it."""

    rank: int
    processes: int
    learners: int  # the ranks below this one
    store: Store  # which all processes reach
    device: torch.device
    engine_ranks: int = 1  # of those that only sample, so many have one engine together

    @property
    def is_disaggregated(self) -> bool:
        return self.learners < self.processes

    @property
    def only_samples(self) -> bool:
        return self.rank >= self.learners

    @property
    def samplers(self) -> range:
        """The ranks that only sample."""
        return range(self.learners, self.processes)

    @property
    def leaders(self) -> range:
        """Of the samplers, the first rank of each engine: the one that makes episodes."""
        return range(self.learners, self.processes, self.engine_ranks)

    @property
    def engine(self) -> range:
        """The ranks of this sampler's engine."""
        first = self.rank - (self.rank - self.learners) % self.engine_ranks
        return range(first, first + self.engine_ranks)


_joined: Job | None = None
_met: tuple[Store, int, int] | None = None  # kept, since rank 0 keeps the others' store
_times_joined = 0


def join(parallel: ParallelConfig, *, engine_ranks: int = 1) -> Job:
    """Join the job that torchrun or `launch` started, or be a job of one process; again, the same one.

    Afterwards torch.distributed's default group is that of the learners, or of this sampler's engine.
    """
    global _joined, _times_joined  # noqa: PLW0603  as torch.distributed keeps its groups
    if _joined is not None and dist.is_initialized():
        return _joined
    _times_joined += 1
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    else:
        torch.set_num_threads(parallel.threads_per_process)
    # Megatron asks for it: the all-reduce of an input's gradient is to start before the next kernel.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    timeout = timedelta(seconds=parallel.timeout_s)
    store, rank, processes = _meet(timeout)
    job = Job(
        rank=rank,
        processes=processes,
        learners=processes - parallel.sampling_processes,
        store=store,
        device=torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu"),
        engine_ranks=engine_ranks,
    )
    members = job.engine if job.only_samples else range(job.learners)
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        timeout=timeout,
        store=within(store, f"ranks from {members[0]}"),
        rank=members.index(rank),
        world_size=len(members),
    )
    _joined = job
    return job


def _meet(timeout: timedelta) -> tuple[Store, int, int]:
    """The store of this job alone, this process's rank, and the number of processes."""
    global _met  # noqa: PLW0603
    if "RANK" not in os.environ:
        return dist.HashStore(), 0, 1  # type: ignore[attr-defined]
    if _met is None:
        _met = next(dist.rendezvous("env://", timeout=timeout))  # type: ignore[attr-defined]
    store, rank, processes = _met
    store.set_timeout(timeout)
    return within(store, f"job {_times_joined}"), rank, processes


def joined() -> Job | None:
    return _joined if dist.is_initialized() else None


def leave() -> None:
    """Undo `join`, so that this process may be part of another job."""
    global _joined  # noqa: PLW0603
    _joined = None
    if dist.is_initialized():
        dist.destroy_process_group()


def within(store: Store, name: str) -> Store:
    """The part of a store whose keys begin with `name`."""
    return PrefixStore(f"rlef/{name}", store)
