"""How a run's episodes come to those who learn.

Colocated, every process makes a share of the episodes and all share them out. Disaggregated, processes of
their own do (`sampling_process.py`), and the learners order and receive. What makes a process's share is the
same in both, `OwnRollouts`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Protocol, Unpack

from rlef.bridge import LearnersEnd
from rlef.curriculum import Progress
from rlef.faults import Watch, slowest
from rlef.own_rollouts import EvaluationSettings, OwnRollouts
from rlef.ports import Network
from rlef.records import Episode, Problem
from rlef.rollout import Collection, interleaved, share_out
from rlef.streaming import merged


class Rollouts(Protocol):
    """A learner's view of the sampling side. Every method is collective over the learners."""

    own_s: dict[str, float]  # this process's seconds of the last step, by phase
    slow_sampler: str  # the process that only samples and was slow in the last step, in words; empty if none

    def start(self, step: int, origin: int, saved: Sequence[str], progress: Progress | None) -> None:
        """Begin with `step`, whose problems are counted from `origin`; go on with what `save` and `record`
        gave."""
        ...

    def collect(self, step: int) -> Collection:
        """The episodes of a step, in the order of their numbers."""
        ...

    def record(self, episodes: Sequence[Episode]) -> Progress | None:
        """Let what came of the step that was collected last decide on later problems, if it is to."""
        ...

    def evaluate(
        self,
        problems: Sequence[Problem],
        *,
        numbers: Sequence[int],
        **settings: Unpack[EvaluationSettings],
    ) -> Sequence[Episode]:
        """As `ports.Play`."""
        ...

    def push(self, policy: Network, version: int) -> None:
        """Sample with these weights from here on."""
        ...

    def save(self) -> str:
        """What is under way, for `start`."""
        ...

    def want_to_stop(self) -> bool:
        """Whether a process that only samples is known to have been asked to stop."""
        ...

    def end(self) -> None:
        """Nothing is wanted any more."""
        ...


class Colocated:
    """`Rollouts` where each process makes its share."""

    def __init__(self, own: OwnRollouts, watch: Watch) -> None:
        self._own = own
        self._watch = watch
        self.own_s: dict[str, float] = {}
        self.slow_sampler = ""

    def start(self, step: int, origin: int, saved: Sequence[str], progress: Progress | None) -> None:
        self._own.start(step, origin, saved, progress)

    def collect(self, step: int) -> Collection:
        with self._watch.phase(f"sampling step {step + 1}"):
            own = self._own.collect(step)
        self.own_s = {"sampling": own.sampling_s, "executing": own.executing_s}
        with self._watch.phase(f"sharing the episodes of step {step + 1}"):
            return share_out(own)

    def record(self, episodes: Sequence[Episode]) -> Progress | None:
        return self._own.record([episode.solved for episode in episodes])

    def evaluate(
        self, problems: Sequence[Problem], *, numbers: Sequence[int], **settings: Unpack[EvaluationSettings]
    ) -> Sequence[Episode]:
        return share_out(self._own.evaluate(problems, numbers=numbers, **settings)).episodes

    def push(self, policy: Network, version: int) -> None:
        self._own.push(policy.named_weights(), version)

    def save(self) -> str:
        return self._own.save()

    def want_to_stop(self) -> bool:
        return False

    def end(self) -> None:
        """What this process has begun, it ends itself."""


class Disaggregated:
    """`Rollouts` where other processes make the episodes."""

    def __init__(self, bridge: LearnersEnd, watch: Watch, *, records: bool) -> None:
        """`records`: whether outcomes decide on problems."""
        self._bridge = bridge
        self._watch = watch
        self._records = records
        self.own_s: dict[str, float] = {}
        self.slow_sampler = ""

    def start(self, step: int, origin: int, saved: Sequence[str], progress: Progress | None) -> None:
        self._bridge.tell("start", (list(saved), progress), step=step, origin=origin)

    def collect(self, step: int) -> Collection:
        with self._watch.phase(f"waiting for the episodes of step {step + 1}"):
            shares: Sequence[Collection] = self._bridge.ask("collect", step=step)
        found = slowest(
            {
                "sampling": [share.sampling_s for share in shares],
                "executing": [share.executing_s for share in shares],
            }
        )
        self.slow_sampler = found.told_of(self._bridge.name_of(found.rank)) if found.is_slow else ""
        return interleaved(shares)

    def record(self, episodes: Sequence[Episode]) -> Progress | None:
        """Each sampler chooses for itself; the first one says where they stand."""
        if not self._records:
            return None
        with self._watch.phase("recording outcomes"):
            replies = self._bridge.ask("record", solved=[int(episode.solved) for episode in episodes])
        progress: Progress = replies[0]
        return progress

    def evaluate(
        self, _problems: Sequence[Problem], *, numbers: Sequence[int], **settings: Unpack[EvaluationSettings]
    ) -> Sequence[Episode]:
        """The samplers know the problems: the held-out ones."""
        details = settings | {"params": asdict(settings["params"])}
        first, stop = numbers[0], numbers[-1] + 1
        return interleaved(self._bridge.ask("evaluate", numbers=[first, stop], **details)).episodes

    def push(self, policy: Network, version: int) -> None:
        self._bridge.send_weights(policy.stage_weights(), version=version)

    def save(self) -> str:
        """For all samplers, by rank 0."""
        saved = [each for each in self._bridge.ask("save") if each]
        return merged(saved) if saved and self._bridge.is_first else ""

    def want_to_stop(self) -> bool:
        return self._bridge.samplers_want_to_stop()

    def end(self) -> None:
        self._bridge.tell("end")
