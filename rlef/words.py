"""What the processes of a job tell each other in a few words, and whether they are still there.

Each process keeps one word in the job's store: where it is, what it has done, a fault, and a number that
grows while it lives. A thread writes it and reads those of others: rank 0 reads all, and all read that of
rank 0 and those of their own engine, so that the store has little to do in a job of many. Whoever waits,
waits for a word, and is told when it can no longer come.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import Condition, Event, Thread
from types import TracebackType
from typing import Self

from torch.distributed.distributed_c10d import Store

from rlef.config import ConfigError
from rlef.faults import CONTINUES, RunFault
from rlef.job import Job, within

_BEAT_S = 1.0  # between two signs of life
_STILL_BEATS = 5  # after which a process counts as silent for those that have waited in vain
_QUICKEST_S, _SLOWEST_S = 0.01, 0.25  # between two looks of one that waits
_SHARE = 0.05  # of the time waited so far, until the next look
_CLOSING_S = 3.0  # for the others to hear the last word


@dataclass(frozen=True, slots=True, kw_only=True)
class Word:
    host: str
    machine: str  # on which process ids are the same, as far as this process can tell
    process_id: int
    beat: int = 0
    where: str = "starting"  # the phase that it is in
    given: int = 0  # rank 0's last order, counted from 1
    order: str = ""  # that order
    done: int = 0  # the last order that it has come to; of rank 0, that all have come to
    wants_to_stop: bool = False
    has_left: bool = False
    fault: str = ""  # what ends the run
    is_refused: bool = False  # the fault is what the user must mend


class Words:
    """This process's word, and those that it listens to. `say` may be called from any thread."""

    def __init__(self, job: Job, *, silence_s: int) -> None:
        self._wants_to_stop = False
        self._rank = job.rank
        listens_to = {0, *job.engine} if job.only_samples else {0}
        if job.rank == 0:
            listens_to = set(range(job.processes))
        self._listens_to = sorted(listens_to - {job.rank})
        self._silence_s = silence_s
        self._own = Word(host=socket.gethostname(), machine=_machine(), process_id=os.getpid())
        self._heard: dict[int, Word] = {}
        self._beats = {rank: _Stillness() for rank in self._listens_to}
        self._gone: set[int] = set()
        self._looks = 0
        self._lost_store = False
        self._waiting_since: float | None = None
        self._changed = Condition()
        self._woken = Event()
        self._is_closing = False
        own: Store = job.store.clone()  # type: ignore[attr-defined]  # others may be waiting at the first one
        self._store = within(own, "words")
        self._thread = Thread(target=self._keep_up, name="words", daemon=True)
        self._thread.start()

    def say(self, **changes: object) -> None:
        with self._changed:
            self._own = replace(self._own, **changes)  # type: ignore[arg-type]
        self._woken.set()

    def enter(self, phase: str) -> None:
        self.say(where=phase)

    def ask_to_stop(self) -> None:
        """May be called by a signal's handler, as it takes no lock."""
        self._wants_to_stop = True

    def heard(self, rank: int) -> Word | None:
        """The last word of a process that this one listens to."""
        with self._changed:
            return self._heard.get(rank)

    def silent(self) -> str:
        """Names of those listened to that are gone, or have been still for some beats; empty if none is."""
        with self._changed:
            still = {rank for rank, beat in self._beats.items() if beat.seconds > _STILL_BEATS * _BEAT_S}
            return self._names(sorted(self._gone | still))

    def wait(self, whom: Sequence[int], ready: Callable[[Word], bool], *, limit_s: int, limit: str) -> None:
        """Until the words of all of `whom` are `ready`; `limit` is the name of the setting of `limit_s`.

        Raises:
            ConfigError: another process refuses the settings.
            RunFault: another process has met one, one of `whom` is gone or silent, or the limit is reached.
        """
        started, answers = time.monotonic(), _Stillness()
        with self._changed:
            self._waiting_since = started
            self._woken.set()
            try:
                while pending := [rank for rank in whom if not self._is_ready(rank, ready)]:
                    answers.look(self._looks)
                    self._raise_faults(pending, answers)
                    if time.monotonic() - started > limit_s:
                        raise RunFault(
                            f"waited in vain while {self._own.where} ({limit} = {limit_s} s), for "
                            f"{self._names(pending)}: see what it said, raise {limit} if it is only slow; "
                            f"{CONTINUES}"
                        )
                    self._changed.wait(_BEAT_S)
            finally:
                self._waiting_since = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Say the last word, and what ends this process if something does. A second time it does nothing."""
        if self._is_closing:
            return
        last: dict[str, object] = {"has_left": True}
        if error is not None:
            is_known = isinstance(error, RunFault | ConfigError)
            fault = str(error) if is_known else f"{type(error).__name__}: {error}"
            last |= {"fault": fault, "is_refused": isinstance(error, ConfigError)}
        self.say(**last)
        if self._rank == 0:
            self._wait_for_farewells()
        self._is_closing = True
        self._woken.set()
        self._thread.join(_CLOSING_S)

    def _wait_for_farewells(self) -> None:
        """Rank 0 may keep the store, without which the others would not hear why it has left."""
        deadline = time.monotonic() + _CLOSING_S
        with self._changed:
            self._waiting_since = time.monotonic()
            while self._thread.is_alive() and time.monotonic() < deadline:
                if all(rank in self._gone or self._has_left(rank) for rank in self._listens_to):
                    return
                self._changed.wait(_QUICKEST_S)

    def _is_ready(self, rank: int, ready: Callable[[Word], bool]) -> bool:
        return rank in self._heard and ready(self._heard[rank])

    def _has_left(self, rank: int) -> bool:
        return rank in self._heard and self._heard[rank].has_left

    def _raise_faults(self, pending: Sequence[int], answers: _Stillness) -> None:
        for _, word in sorted(self._heard.items()):
            if word.is_refused:
                raise ConfigError(word.fault)
            if word.fault:
                raise RunFault(word.fault, is_told=True)
        if gone := [rank for rank in pending if rank in self._gone or self._has_left(rank)]:
            raise RunFault(
                f"lost {self._names(gone)} while {self._own.where}: the process has ended; see what it said; "
                f"{CONTINUES}",
                is_own=False,
            )
        heard = [rank for rank in pending if rank in self._heard]
        if silent := [rank for rank in heard if self._beats[rank].seconds > self._silence_s]:
            raise RunFault(self._silence(silent, self._beats[silent[0]].seconds))
        if self._lost_store or answers.seconds > self._silence_s:
            raise RunFault(self._silence([0], answers.seconds))

    def _silence(self, ranks: Sequence[int], seconds: float) -> str:
        since = time.strftime("%H:%M:%S", time.localtime(time.time() - seconds))
        return (
            f"lost {self._names(ranks)} while {self._own.where}: no sign of life since {since} "
            f"(parallel.silence_s = {self._silence_s} s); look whether it hangs, and whether its machine can "
            f"be reached; {CONTINUES}"
        )

    def _names(self, ranks: Sequence[int]) -> str:
        return ", ".join(
            f"rank {rank} on {self._heard[rank].host} ({self._heard[rank].where})"
            if rank in self._heard
            else f"rank {rank}, which has not come"
            for rank in ranks
        )

    def _keep_up(self) -> None:
        try:
            while not self._is_closing:
                self._exchange()
                self._woken.wait(self._pause())
                self._woken.clear()
            self._exchange()
        except RuntimeError:  # of the store, whose host has ended
            with self._changed:
                self._lost_store = True
                self._gone = {rank for rank, word in self._heard.items() if _is_gone(word, self._own.machine)}
                self._changed.notify_all()

    def _pause(self) -> float:
        since = self._waiting_since
        if since is None:
            return _BEAT_S
        return min(max((time.monotonic() - since) * _SHARE, _QUICKEST_S), _SLOWEST_S)

    def _exchange(self) -> None:
        with self._changed:
            self._own = replace(self._own, beat=self._own.beat + 1, wants_to_stop=self._wants_to_stop)
            own, known = self._own, dict(self._heard)
        self._store.set(str(self._rank), json.dumps(asdict(own)))
        gone = {rank for rank, word in known.items() if _is_gone(word, own.machine)}  # before its last word
        present = [rank for rank in self._listens_to if rank in known or self._store.check([str(rank)])]
        words = self._store.multi_get([str(rank) for rank in present]) if present else []
        with self._changed:
            self._heard = {rank: Word(**json.loads(word)) for rank, word in zip(present, words, strict=True)}
            for rank, stillness in self._beats.items():
                stillness.look(self._heard[rank].beat if rank in self._heard else -1)
            self._gone = gone
            self._looks += 1
            self._changed.notify_all()


@dataclass(slots=True)
class _Stillness:
    """For how long a number has not changed. A pause of this process between two looks counts as a beat."""

    number: int = -1
    seconds: float = 0.0
    looked_at: float = 0.0

    def look(self, number: int) -> None:
        now = time.monotonic()
        self.seconds = self.seconds + min(now - self.looked_at, 2 * _BEAT_S) if number == self.number else 0.0
        self.number, self.looked_at = number, now


def _machine() -> str:
    """Processes that give the same see each other in /proc."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    return f"{boot} {Path('/proc/self/ns/pid').readlink()}"


def _is_gone(word: Word, machine: str) -> bool:
    """Whether its process has ended, as far as this machine knows."""
    if word.machine != machine:
        return False
    try:
        state = (
            Path(f"/proc/{word.process_id}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
        )
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state in "ZX"
