"""Who touched which memory last, and whether anything orders that before the next touch.

Every thread could run ahead until a barrier stops it. So instead of trying schedules, each access is compared
with the last ones of the same memory: those of the same thread came before it, those that a barrier of the
block (or, within a warp, of the warp) separates came before it, and any others may come in any order. If one
of the two writes, that is a race, in whatever order this simulator happens to run the threads.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tests.kernels.ptx.faults import Race

WARP = 32
NEVER = -1  # a time, of what was not touched yet
SEVERAL = -2  # a thread or a warp

Integers = NDArray[np.int64]


class Clock:
    """Times of a launch: they count the barriers, and run on from one block to the next."""

    def __init__(self, threads: int) -> None:
        self.time = 0  # since when all threads of the block may do as they please
        self.begin = 0  # of the block
        self.moments = np.zeros(threads, np.int64)  # [threads] the same within a warp
        self.threads = np.arange(threads)  # [threads] no two in a launch are the same
        self.place = 0  # of the instruction that runs

    def start_block(self) -> None:
        if self.time:
            self.threads = self.threads + len(self.threads)
        self.time += 1
        self.begin = self.time

    def pass_barrier(self) -> None:
        self.time += 1

    def pass_warp_barrier(self, mask: NDArray[np.bool_]) -> None:
        self.moments += mask


class _Last:
    """The last access of each granule: by whom, when and where in the program."""

    def __init__(self, granules: int) -> None:
        self.time = np.full(granules, NEVER, np.int64)
        self.thread = np.full(granules, NEVER, np.int64)
        self.warp = np.full(granules, NEVER, np.int64)
        self.moment = np.full(granules, NEVER, np.int64)
        self.place = np.full(granules, NEVER, np.int64)
        self.elsewhere = np.zeros(granules, bool)  # a block before this one has touched it


class Accesses:
    """To one memory, in granules: pieces that no access divides."""

    def __init__(self, granules: int, clock: Clock) -> None:
        self._clock = clock
        self._reads, self._writes = _Last(granules), _Last(granules)

    def written(self, granules: Integers) -> NDArray[np.bool_]:
        return self._writes.time[granules] != NEVER

    def written_by_several_warps(self, granules: Integers) -> NDArray[np.bool_]:
        return self._writes.warp[granules] == SEVERAL

    def read(self, granules: Integers, who: Integers, *, by_warp: bool = False) -> None:
        """Of granules `[accesses, pieces]`, by the threads `[accesses]` or by the whole warps of these."""
        self._require_order(self._writes, granules, who, by_warp, "reads what another thread wrote")
        self._remember(self._reads, granules, who, by_warp)

    def write(self, granules: Integers, who: Integers, changes: NDArray[np.bool_] | None = None) -> None:
        """`changes`, `[accesses, pieces]`: False where it writes what is there, as some layouts do."""
        self._require_order(self._reads, granules, who, False, "overwrites what another thread reads")
        self._require_order(
            self._writes, granules, who, False, "overwrites what another thread wrote", changes
        )
        self._remember(self._writes, granules, who, False)

    def _identities(self, who: Integers, pieces: int, by_warp: bool) -> tuple[Integers, Integers, Integers]:
        thread = self._clock.threads[who][:, None].repeat(pieces, 1)
        warp, moment = thread // WARP, self._clock.moments[who][:, None].repeat(pieces, 1)
        return (np.full_like(thread, SEVERAL) if by_warp else thread), warp, moment

    def _require_order(
        self,
        last: _Last,
        granules: Integers,
        who: Integers,
        by_warp: bool,
        what: str,
        matters: NDArray[np.bool_] | None = None,
    ) -> None:
        thread, warp, moment = self._identities(who, granules.shape[1], by_warp)
        time = last.time[granules]
        at_any_time = (time == self._clock.time) | ((time < self._clock.begin) & (time != NEVER))
        by_another = (last.warp[granules] != warp) | (
            (last.moment[granules] == moment) & ((last.thread[granules] != thread) | by_warp)
        )
        races = (at_any_time & by_another) | last.elsewhere[granules]
        if matters is not None:
            races &= matters
        if races.any():
            access, piece = np.argwhere(races)[0]
            place = last.place[granules[access, piece]]
            raise Race(f"thread {who[access]} {what} (instruction {place}), with no barrier between")

    def _remember(self, last: _Last, granules: Integers, who: Integers, by_warp: bool) -> None:
        thread, warp, moment = self._identities(who, granules.shape[1], by_warp)
        time = last.time[granules]
        is_now = time == self._clock.time
        others = is_now & (last.moment[granules] == moment) & (last.thread[granules] != thread)
        thread[others] = SEVERAL
        warp[is_now & (last.warp[granules] != warp)] = SEVERAL
        last.elsewhere[granules[(time < self._clock.begin) & (time != NEVER)]] = True
        for field, value in ((last.thread, thread), (last.warp, warp)):
            field[granules] = value
            # Where several accesses of one instruction meet, only one of them was remembered.
            field[granules[field[granules] != value]] = SEVERAL
        last.time[granules] = self._clock.time
        last.moment[granules] = moment
        last.place[granules] = self._clock.place
