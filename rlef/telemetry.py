"""What a run tells while it goes: `metrics.jsonl`, the progress display, and where the seconds went.

The loop calls `Telemetry.step` once a step and knows nothing else of this file. Phases are timed from
outside, by wrapping what the loop calls (`PhaseTimer.timed`) or by a `with` around it (`PhaseTimer.phase`).

Metrics that have a place in the display and the report; a step may lack any of them and may have others:
    solve_rate, reward    means over the step's training episodes
    kl                    mean token log-ratio to the reference policy, averaged over turns
    response_tokens       mean length of a response
    policy/loss, value/loss
    sampled_tokens, tests_run    counts of the step
    executor/longest_s    of the program that took longest
    executor/restarts, executor/retries    workers replaced, and programs run again because of that: told in a
                          line of their own
and those that are added here:
    seconds               of the step, without the phases of `BETWEEN_STEPS`
    seconds/PHASE         of each phase; inner phases are not counted in outer ones
    tokens_per_s, tests_per_s    the counts over `seconds`
"""

from __future__ import annotations

import json
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import ParamSpec, Self, TypeVar

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from rlef.files import naming, replacing
from rlef.records import StepStats

METRICS_FILE = "metrics.jsonl"
SECONDS = "seconds"
BETWEEN_STEPS = ("evaluation", "checkpoint")  # phases that no training step is charged with

_SHOWN = (
    ("solve rate", "solve_rate", "{:.3f}"),
    ("reward", "reward", "{:+.3f}"),
    ("KL", "kl", "{:.4f}"),
    ("tokens/s", "tokens_per_s", "{:,.0f}"),
    ("tests/s", "tests_per_s", "{:,.0f}"),
    ("longest program", "executor/longest_s", "{:.1f} s"),
)
_RATES = (("tokens_per_s", "sampled_tokens"), ("tests_per_s", "tests_run"))
_REMEMBERED = 24  # steps behind a sparkline and the estimate of the time left

_P = ParamSpec("_P")
_T = TypeVar("_T")


class PhaseTimer:
    """Adds up the seconds of named phases. For one thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._charged_until = clock()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._charge()
        self._open.append(name)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def timed(self, name: str, function: Callable[_P, _T]) -> Callable[_P, _T]:
        """`function`, whose calls count as the phase `name`."""

        def call(*args: _P.args, **kwargs: _P.kwargs) -> _T:
            with self.phase(name):
                return function(*args, **kwargs)

        return call

    def take(self) -> dict[str, float]:
        """Seconds per phase since the last call."""
        self._charge()
        taken, self._seconds = self._seconds, {}
        return taken

    def _charge(self) -> None:
        now = self._clock()
        if self._open:
            self._seconds[self._open[-1]] = self._seconds.get(self._open[-1], 0.0) + now - self._charged_until
        self._charged_until = now


class MetricsLog:
    """`metrics.jsonl`: one line per step, on the disk before `append` returns, no step twice."""

    def __init__(self, path: Path, *, completed_steps: int) -> None:
        """Lines of steps after `completed_steps` are dropped, and so is one that a crash cut short."""
        self._path = path
        self._last_step = completed_steps
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = (
            [stats for stats in read_metrics(path) if stats.step <= completed_steps] if path.exists() else []
        )
        content = b"".join(map(_line, kept))
        if not path.exists() or path.read_bytes() != content:
            # A whole new file takes the old one's place, so that a crash here cannot lose the steps that
            # count.
            with replacing(path) as writing:
                writing.write_bytes(content)

    def append(self, stats: StepStats) -> None:
        assert stats.step > self._last_step, f"step {stats.step} after step {self._last_step}"
        with naming(self._path), self._path.open("ab", buffering=0) as file:
            whole = file.seek(0, os.SEEK_END)
            line = _line(stats)
            try:
                written = file.write(line)
                while written < len(line):  # a disk that fills up takes a part, and refuses the next
                    written += file.write(line[written:])
                os.fsync(file.fileno())
            except OSError:
                file.truncate(whole)
                raise
        self._last_step = stats.step


def read_metrics(path: Path) -> list[StepStats]:
    """The steps of a `metrics.jsonl`. A last line without its newline, cut short by a crash, does not count.

    Raises:
        ValueError: another line is not one of ours; the message names it.
    """
    lines = path.read_bytes().split(b"\n")[:-1]
    return [_parse(line, number, path) for number, line in enumerate(lines, start=1)]


class Telemetry:
    """The voice of one run. On ranks other than 0 it is silent and writes nothing."""

    def __init__(
        self,
        directory: Path,
        *,
        name: str,
        total_steps: int,
        completed_steps: int = 0,
        rank: int = 0,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`directory` gets `metrics.jsonl`, cut back to `completed_steps` when a run is resumed."""
        self.timer = PhaseTimer(clock)
        self._speaks = rank == 0
        self._name = name
        self._total_steps = total_steps
        self._completed_steps = completed_steps
        self._clock = clock
        self._step_started = clock()
        self._history: deque[Mapping[str, float]] = deque(maxlen=_REMEMBERED)
        self._console = console or Console(markup=False, highlight=False)
        self._live = Live(console=self._console, auto_refresh=False, get_renderable=self._render)
        if self._speaks:
            self._log = MetricsLog(directory / METRICS_FILE, completed_steps=completed_steps)

    def __enter__(self) -> Self:
        if self._speaks and self._console.is_terminal:
            self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._live.stop()

    def step(self, stats: StepStats) -> None:
        """Record a finished step and show it."""
        now = self._clock()
        metrics = stats.metrics | _seconds(now - self._step_started, self.timer.take(), stats.metrics)
        self._step_started = now
        self._completed_steps = stats.step
        self._history.append(metrics)
        if not self._speaks:
            return
        self._log.append(StepStats(step=stats.step, metrics=metrics))
        if self._live.is_started:
            self._live.refresh()
        else:
            self._console.print(self._one_line(), soft_wrap=True)
        if trouble := executor_trouble([stats]):
            self.note(f"step {stats.step}: {trouble}")

    def note(self, text: str) -> None:
        """One line beside the steps: an evaluation's result, a checkpoint that was taken up."""
        if self._speaks:
            self._console.print(text, soft_wrap=True)

    def _one_line(self) -> str:
        figures = "".join(f"  {label} {value}" for label, value in self._figures())
        left = _clock_time(self._seconds_left())
        return f"step {self._completed_steps}/{self._total_steps}{figures}  left {left}"

    def _render(self) -> Group:
        bar = Table.grid(padding=(0, 2))
        bar.add_row(
            Text(self._name, style="bold"),
            ProgressBar(total=self._total_steps, completed=self._completed_steps, width=32),
            f"step {self._completed_steps}/{self._total_steps}",
            Text(f"{_clock_time(self._seconds_left())} left", style="cyan"),
        )
        figures = Table.grid(padding=(0, 1))
        for (label, value), (_, metric, _) in zip(self._figures(), _SHOWN, strict=True):
            past = [metrics[metric] for metrics in self._history if metric in metrics]
            figures.add_row(
                Text(label, style="dim"), Text(value, justify="right"), Text(sparkline(past), style="cyan")
            )
        return Group(bar, figures)

    def _figures(self) -> list[tuple[str, str]]:
        newest = self._history[-1] if self._history else {}
        return [
            (label, pattern.format(newest[metric]) if metric in newest else "-")
            for label, metric, pattern in _SHOWN
        ]

    def _seconds_left(self) -> float | None:
        if not self._history:
            return None
        mean = sum(metrics[SECONDS] for metrics in self._history) / len(self._history)
        return mean * max(0, self._total_steps - self._completed_steps)


def executor_trouble(steps: Sequence[StepStats]) -> str:
    """How often the machine failed programs in these steps, in words; empty if it never did."""
    restarts, retries = (
        int(sum(stats.metrics.get(f"executor/{name}", 0.0) for stats in steps))
        for name in ("restarts", "retries")
    )
    if not restarts and not retries:
        return ""
    return f"executor workers replaced: {restarts}, programs run again because of that: {retries}"


def sparkline(values: Sequence[float]) -> str:
    """One block per value, from the least to the greatest; a gap for what is not finite."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return ""
    low, span = min(finite), max(finite) - min(finite)
    blocks = "▁▂▃▄▅▆▇█"
    heights = [round((value - low) / span * 7) if span and math.isfinite(value) else 0 for value in values]
    return "".join(
        blocks[height] if math.isfinite(value) else " " for height, value in zip(heights, values, strict=True)
    )


def _seconds(elapsed: float, phases: Mapping[str, float], counts: Mapping[str, float]) -> dict[str, float]:
    seconds = elapsed - sum(phases.get(phase, 0.0) for phase in BETWEEN_STEPS)
    added = {SECONDS: seconds} | {f"{SECONDS}/{phase}": spent for phase, spent in phases.items()}
    for rate, count in _RATES:
        if count in counts and seconds > 0:
            added[rate] = counts[count] / seconds
    return added


def _clock_time(seconds: float | None) -> str:
    if seconds is None:
        return "-:--"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _line(stats: StepStats) -> bytes:
    """JSON knows no NaN: what is not finite becomes null."""
    finite = {name: value if math.isfinite(value) else None for name, value in stats.metrics.items()}
    return json.dumps({"step": stats.step, **finite}, allow_nan=False).encode() + b"\n"


def _parse(line: bytes, number: int, path: Path) -> StepStats:
    try:
        fields = json.loads(line)
        step = int(fields.pop("step"))
        metrics = {name: math.nan if value is None else float(value) for name, value in fields.items()}
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ValueError(f"{path}, line {number}: not a step's metrics; delete the line") from None
    return StepStats(step=step, metrics=metrics)
