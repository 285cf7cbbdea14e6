"""What ends a run that nobody asked to end, told in one line: memory, disks, processes that do not answer.

`Watch.phase` stands around each part of a step. It turns what it knows into a `RunFault`, whose message says
what the run was doing, with which sizes, and which setting to change; anything else is ours, and keeps its
traceback. It also leaves word of where this process is, so that one that waits in vain can say for whom.
"""

from __future__ import annotations

import errno
import os
import socket
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Thread

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from rlef.config import Config
from rlef.job import joined, within
from rlef_sandbox import SandboxFault

SLOW_RATIO, SLOW_S = 2.0, 1.0  # a process is slow if its phase takes more than both

_ASK_S = 5.0  # for the word of the others, when one of them may be gone
_SHORTEST_S = 1e-3  # below this a ratio of seconds says nothing
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}  # met in writing only
CONTINUES = "the same command continues from the last checkpoint"

# What to lower when memory runs out: the phase's own settings first. A phase's name is its first word.
_TO_LOWER = {
    "learning": ("ppo.micro_batch_tokens",),
    "sampling": ("rollout.slots", "rollout.max_response_tokens"),
    "evaluating": ("rollout.slots", "rollout.max_response_tokens"),
}
_TO_LOWER_ELSEWHERE = ("rollout.slots", "ppo.micro_batch_tokens")


class RunFault(RuntimeError):  # noqa: N818 - as SandboxFault: no fault of the program
    """What ended the run: one line that says what it met, where, and what to do.

    `is_shared`: every process raises the same, so that one of them tells it for all. `is_own`: this process
    met it, where else it lost another one that did. `is_told`: another process met it, and says so itself.
    """

    def __init__(
        self, message: str, *, is_shared: bool = False, is_own: bool = True, is_told: bool = False
    ) -> None:
        super().__init__(message)
        self.is_shared = is_shared
        self.is_own = is_own
        self.is_told = is_told


class SkippedTooOftenError(RuntimeError):
    """So many updates of one network in a row had a gradient that is not finite."""


@contextmanager
def doing(what: str) -> Iterator[None]:
    """An error that comes from inside carries the note `what`: the work, and its sizes."""
    try:
        yield
    except Exception as error:
        error.add_note(what)
        raise


class SkippedInARow:
    """Counts the updates that each network has skipped since its last one that moved a weight."""

    def __init__(self, most: int) -> None:
        """`most` in a row end the run; 0: none does."""
        self._most = most
        self._counts: dict[str, int] = {}

    def add(self, network: str, *, skipped: bool) -> None:
        """Raises SkippedTooOftenError when they are too many."""
        self._counts[network] = self._counts.get(network, 0) + 1 if skipped else 0
        if self._most and self._counts[network] >= self._most:
            raise SkippedTooOftenError(
                f"{self._most} updates of the {network} network in a row had a gradient that is not finite "
                f"(run.max_skipped_updates = {self._most})"
            )


def not_finite(error: SkippedTooOftenError, *, step: int, checkpoint: Path | None) -> RunFault:
    """The end of a run that learns nothing more; every process comes to it in the same update."""
    last = f"the last checkpoint is {checkpoint}" if checkpoint else "there is no checkpoint yet"
    return RunFault(
        f"step {step}: {error}; nothing new was saved, {last}; "
        "see rewards.* for values out of range, lower optimizer.lr, or start anew with --resume never",
        is_shared=True,
    )


class Watch:
    """This process's eye on its run."""

    def __init__(
        self,
        config: Config,
        tell: Callable[[str], None] | None = None,
        silent: Callable[[], str] | None = None,
    ) -> None:
        """Where processes leave word beside torch.distributed's default group, `tell` is told the name of
        each phase, and `silent` names those that give no sign of life."""
        self._config = config
        self._tell = tell
        self._silent = silent
        self._entered = 0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Every process of the run enters the same phases in the same order.

        Raises:
            RunFault: memory, a disk, the sandbox or another process ended what is inside.
        """
        try:
            self._leave_word(name)
            yield
        except RunFault:
            raise
        except Exception as error:
            fault = self._explained(error, name)
            if fault is None:
                raise
            raise fault from error

    def _explained(self, error: Exception, phase: str) -> RunFault | None:
        notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
        if is_out_of_memory(error):
            return RunFault(f"out of memory while {phase}{notes}: {self._less_memory(phase)}; {CONTINUES}")
        if isinstance(error, OSError) and error.filename is not None and error.errno in _DISK:
            return RunFault(
                f"{error.filename} cannot be written ({error.strerror}) while {phase}: free space on its "
                f"disk, or raise its quota; what was there before is whole, and {CONTINUES}"
            )
        if isinstance(error, SandboxFault):
            return RunFault(
                f"the sandbox failed while {phase}{notes}: {error}; see what rlef doctor finds on this "
                f"machine; {CONTINUES}"
            )
        if timed_out(error):
            limit = self._config.parallel.timeout_s
            return RunFault(
                f"waited in vain while {phase}{notes} (parallel.timeout_s = {limit} s), for "
                f"{self._waited_for(phase)}: see what it said, raise parallel.timeout_s if it is only slow; "
                f"{CONTINUES}"
            )
        if lost_another(error):
            return RunFault(
                f"lost another process while {phase}{notes}: see what that one said; {CONTINUES}",
                is_own=False,
            )
        return None

    def _less_memory(self, phase: str) -> str:
        names = _TO_LOWER.get(phase.split(maxsplit=1)[0], _TO_LOWER_ELSEWHERE)
        if self._config.rollout.sampler == "vllm":
            names = (*names, "vllm.memory_fraction")
        lower = " or ".join(f"{name} = {_setting(self._config, name)}" for name in names)
        return f"lower {lower}, or raise parallel.tensor = {self._config.parallel.tensor}"

    def _leave_word(self, phase: str) -> None:
        self._entered += 1
        if self._tell is not None:
            self._tell(phase)
        if _is_one_of_several():
            _store().set(str(dist.get_rank()), f"{self._entered}|{socket.gethostname()}|{phase}")

    def _waited_for(self, phase: str) -> str:
        if not dist.is_initialized():
            return "processes that have not joined, or rank 0, which all meet through"
        if self._silent is not None:
            if named := self._silent():
                return named
            if not _is_one_of_several():
                return "another process of the job, all of which give signs of life"
        words: dict[int, str] = {}
        asking = Thread(target=_ask, args=(words,), daemon=True)  # the one that keeps the words may be gone
        asking.start()
        asking.join(_ASK_S)
        places = {rank: word.split("|", 2) for rank, word in sorted(words.items())}
        behind = [
            f"rank {rank} on {host} ({where})"
            for rank, (entered, host, where) in places.items()
            if int(entered) < self._entered
        ]
        if behind:
            return ", ".join(behind)
        if not places:
            return "rank 0, which does not answer"
        others = [f"rank {rank} on {host}" for rank, (_, host, _) in places.items()]
        waited_for = others[0] if len(others) == 1 else "another process"
        return f"{waited_for}; all have begun {phase}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Slowest:
    """The process that others wait for most, in one phase."""

    rank: int
    phase: str
    seconds: float
    median: float  # of all processes; the lower one of two

    @property
    def ratio(self) -> float:
        return max(self.seconds, _SHORTEST_S) / max(self.median, _SHORTEST_S)

    @property
    def is_slow(self) -> bool:
        return self.ratio > SLOW_RATIO and self.seconds > SLOW_S

    def told_of(self, process: str) -> str:
        return (
            f"{process} is slow: {self.phase} took it {self.seconds:.1f} s, {self.ratio:.1f} times the "
            f"median of {self.median:.1f} s"
        )


def slowest(seconds: Mapping[str, Sequence[float]]) -> Slowest:
    """Of each phase's seconds by rank: a slow process before any other, then most seconds over the median."""
    candidates = [
        Slowest(rank=rank, phase=phase, seconds=own, median=statistics.median_low(of_all))
        for phase, of_all in seconds.items()
        for rank, own in enumerate(of_all)
    ]
    return max(candidates, key=lambda each: (each.is_slow, each.seconds - each.median))


class Pace:
    """Compares the processes' seconds. Made and asked by all of them together."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._hosts: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(self._hosts, socket.gethostname())

    def compare(self, own: Mapping[str, float]) -> Slowest:
        """`own`: this process's seconds by phase, without what it waited for others; same phases on all."""
        mine = torch.tensor(list(own.values()), dtype=torch.float32, device=self._device)  # [phases]
        of_all = [torch.empty_like(mine) for _ in self._hosts]
        dist.all_gather(of_all, mine)
        by_phase = torch.stack(of_all, dim=1).tolist()  # [phases, ranks]
        return slowest(dict(zip(own, by_phase, strict=True)))

    def describe(self, found: Slowest) -> str:
        return found.told_of(f"rank {found.rank} on {self._hosts[found.rank]}")


def is_out_of_memory(error: BaseException) -> bool:
    """Of a GPU or of the host, whichever part of torch, numpy or the system says so."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    said = ("DefaultCPUAllocator", "can't allocate memory", "bad_alloc", "CUDA out of memory")
    return isinstance(error, RuntimeError) and any(words in str(error) for words in said)


def timed_out(error: BaseException) -> bool:
    """A collective has waited as long as it may."""
    words = str(error).lower()
    return _is_of_collectives(error) and ("timed out" in words or "timeout" in words)


def lost_another(error: BaseException) -> bool:
    """A collective cannot be finished, since a process of it has ended."""
    words = ("connection", "broken pipe", "socket", "recv")
    return _is_of_collectives(error) and any(word in str(error).lower() for word in words)


def _is_of_collectives(error: BaseException) -> bool:
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo/transport" in str(error)
    )


def described(error: RunFault) -> str:
    """The line to tell: who met it, and what."""
    if error.is_shared or "RANK" not in os.environ:
        return str(error)
    return f"rank {os.environ['RANK']} on {socket.gethostname()}: {error}"


def _setting(config: Config, name: str) -> object:
    section, key = name.split(".")
    return getattr(getattr(config, section), key)


def _is_one_of_several() -> bool:
    """Of processes that leave each other word in `_store`: those that learn."""
    job = joined()
    return job is not None and not job.only_samples and dist.get_world_size() > 1


def _store() -> Store:
    job = joined()
    assert job is not None
    return within(job.store, "phase")


def _ask(words: dict[int, str]) -> None:
    store, own = _store(), dist.get_rank()
    for rank in range(dist.get_world_size()):
        if rank != own and store.check([str(rank)]):
            words[rank] = store.get(str(rank)).decode()
