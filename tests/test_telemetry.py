import io
import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from rlef.records import StepStats
from rlef.telemetry import MetricsLog, PhaseTimer, Telemetry, read_metrics, sparkline
from tests.small_runs import files_of_at_most


class Clock:
    """A clock that goes when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def printed() -> Iterator[io.StringIO]:
    with io.StringIO() as stream:
        yield stream


def stats(step: int, **metrics: float) -> StepStats:
    return StepStats(step=step, metrics=metrics)


def plain_console(stream: io.StringIO) -> Console:
    return Console(file=stream, force_terminal=False, markup=False, highlight=False)


def steps_of(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_a_phase_counts_the_seconds_inside_it(clock: Clock) -> None:
    timer = PhaseTimer(clock)
    clock.now += 1
    with timer.phase("rollout"):
        clock.now += 2
    clock.now += 4
    assert timer.take() == {"rollout": 2}
    assert timer.take() == {}


def test_an_inner_phase_is_not_counted_in_the_outer_one(clock: Clock) -> None:
    timer = PhaseTimer(clock)
    with timer.phase("outer"):
        clock.now += 1
        with timer.phase("inner"):
            clock.now += 10
        clock.now += 2
    assert timer.take() == {"outer": 3, "inner": 10}


def test_a_timed_function_is_a_phase_even_when_it_raises(clock: Clock) -> None:
    timer = PhaseTimer(clock)

    def fail_after(seconds: float) -> None:
        clock.now += seconds
        raise OSError("as planned")

    with pytest.raises(OSError, match="as planned"):
        timer.timed("rollout", fail_after)(3)
    clock.now += 5
    assert timer.take() == {"rollout": 3}


def test_each_step_is_one_line_that_reads_back(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", completed_steps=0)
    log.append(stats(1, kl=0.5))
    log.append(stats(2, kl=0.25))
    assert read_metrics(tmp_path / "metrics.jsonl") == [stats(1, kl=0.5), stats(2, kl=0.25)]


def test_what_is_not_finite_is_null_on_the_disk_and_nan_when_read(tmp_path: Path) -> None:
    MetricsLog(tmp_path / "metrics.jsonl", completed_steps=0).append(stats(1, kl=math.inf))
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "kl": None}
    (read,) = read_metrics(tmp_path / "metrics.jsonl")
    assert math.isnan(read.metrics["kl"])


@given(written=st.integers(0, 6), resumed_at=st.integers(0, 6), torn=st.booleans())
def test_after_a_resume_every_step_appears_once(
    tmp_path_factory: pytest.TempPathFactory, written: int, resumed_at: int, torn: bool
) -> None:
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    log = MetricsLog(path, completed_steps=0)
    for step in range(1, written + 1):
        log.append(stats(step))
    if torn:
        with path.open("a") as file:
            file.write('{"step": 7, "k')
    resumed = MetricsLog(path, completed_steps=resumed_at)
    for step in range(resumed_at + 1, 8):
        resumed.append(stats(step))
    assert steps_of(path) == [*range(1, min(written, resumed_at) + 1), *range(resumed_at + 1, 8)]


def test_a_step_that_is_already_there_is_a_fault_of_ours(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", completed_steps=4)
    with pytest.raises(AssertionError, match="step 4 after step 4"):
        log.append(stats(4))


def test_a_full_disk_is_an_error_that_names_the_file_and_leaves_it_as_it_was(
    tmp_path: Path,
) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, completed_steps=0)
    log.append(stats(1, kl=0.5))
    before = path.read_bytes()
    with files_of_at_most(len(before) + 5), pytest.raises(OSError, match=f"'{path}'$"):
        log.append(stats(2, kl=0.25))
    assert path.read_bytes() == before
    log.append(stats(2, kl=0.25))
    assert steps_of(path) == [1, 2]


def test_a_line_that_is_not_ours_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnonsense\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: not a step's metrics; delete the line"):
        read_metrics(path)


def test_a_step_without_a_terminal_is_one_printed_line(
    tmp_path: Path, clock: Clock, printed: io.StringIO
) -> None:
    telemetry = Telemetry(tmp_path, name="tiny", total_steps=9, console=plain_console(printed), clock=clock)
    with telemetry:
        with telemetry.timer.phase("rollout"):
            clock.now += 8
        clock.now += 2
        counts = {"sampled_tokens": 12_000, "tests_run": 50, "executor/longest_s": 2.0}
        telemetry.step(stats(1, solve_rate=0.25, reward=-0.5, kl=0.01, **counts))
    assert printed.getvalue() == (
        "step 1/9  solve rate 0.250  reward -0.500  KL 0.0100  tokens/s 1,200  tests/s 5  "
        "longest program 2.0 s  left 1:20\n"
    )
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    assert line.metrics["seconds"] == 10
    assert line.metrics["seconds/rollout"] == 8
    assert line.metrics["tokens_per_s"] == 1200


def test_a_step_is_not_charged_with_the_evaluation_before_it(tmp_path: Path, clock: Clock) -> None:
    telemetry = Telemetry(
        tmp_path, name="tiny", total_steps=2, console=plain_console(io.StringIO()), clock=clock
    )
    with telemetry.timer.phase("evaluation"):
        clock.now += 60
    clock.now += 10
    telemetry.step(stats(1, tests_run=50))
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    assert line.metrics == {"tests_run": 50, "seconds": 10, "seconds/evaluation": 60, "tests_per_s": 5}


def test_figures_that_a_step_lacks_are_dashes(tmp_path: Path, clock: Clock, printed: io.StringIO) -> None:
    telemetry = Telemetry(tmp_path, name="tiny", total_steps=1, console=plain_console(printed), clock=clock)
    telemetry.step(stats(1))
    assert printed.getvalue() == (
        "step 1/1  solve rate -  reward -  KL -  tokens/s -  tests/s -  longest program -  left 0:00\n"
    )


def test_a_step_in_which_the_machine_failed_programs_says_how_often(
    tmp_path: Path, clock: Clock, printed: io.StringIO
) -> None:
    telemetry = Telemetry(tmp_path, name="tiny", total_steps=2, console=plain_console(printed), clock=clock)
    telemetry.step(stats(1, **{"executor/restarts": 0.0, "executor/retries": 0.0}))
    telemetry.step(stats(2, **{"executor/restarts": 2.0, "executor/retries": 1.0}))
    first, second, told = printed.getvalue().splitlines()
    assert (first[:8], second[:8]) == ("step 1/2", "step 2/2")
    assert told == "step 2: executor workers replaced: 2, programs run again because of that: 1"


def test_a_note_is_printed_as_it_is(tmp_path: Path, printed: io.StringIO) -> None:
    telemetry = Telemetry(tmp_path, name="tiny", total_steps=1, console=plain_console(printed))
    telemetry.note("start: 1@3 [bold] 0.31")
    assert printed.getvalue() == "start: 1@3 [bold] 0.31\n"


def test_other_ranks_neither_print_nor_write(tmp_path: Path, printed: io.StringIO) -> None:
    with Telemetry(tmp_path, name="tiny", total_steps=1, rank=1, console=plain_console(printed)) as telemetry:
        telemetry.step(stats(1))
        telemetry.note("unheard")
    assert printed.getvalue() == ""
    assert list(tmp_path.iterdir()) == []


def test_on_a_terminal_the_display_is_redrawn_with_the_newest_figures(
    tmp_path: Path, clock: Clock, printed: io.StringIO
) -> None:
    console = Console(
        file=printed, force_terminal=True, width=100, markup=False, highlight=False, color_system=None
    )
    with Telemetry(tmp_path, name="tiny", total_steps=4, console=console, clock=clock) as telemetry:
        for step in (1, 2):
            clock.now += 5
            telemetry.step(stats(step, solve_rate=step / 4))
    last_frame = printed.getvalue().rpartition("tiny")[2]
    assert "step 2/4" in last_frame
    assert "0:10 left" in last_frame
    assert "0.500 ▁█" in last_frame


def test_a_sparkline_spans_the_least_to_the_greatest_and_leaves_gaps() -> None:
    assert sparkline([0.0, math.nan, 7.0]) == "▁ █"
    assert sparkline([2.0, 2.0]) == "▁▁"
    assert sparkline([]) == ""
