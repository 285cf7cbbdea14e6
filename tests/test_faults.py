"""Faults that end a run: each is one line that says what was met, while doing what, and what to change."""

from __future__ import annotations

import errno
import re
import resource
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from rlef.config import Config, ParallelConfig, PPOConfig
from rlef.faults import (
    Pace,
    RunFault,
    SkippedInARow,
    SkippedTooOftenError,
    Watch,
    doing,
    is_out_of_memory,
    slowest,
)
from rlef.launch import TOLD
from rlef.megatron_policy import initialize
from tests.distributed import run_ranks
from tests.small_runs import Command, nothing_left_behind, read_lines, run_file, run_here


@contextmanager
def address_space_of_at_most_another(size: int) -> Iterator[None]:
    """This process may map `size` more bytes inside."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_memory_that_runs_out_names_the_phase_the_sizes_and_what_to_lower() -> None:
    config = Config(ppo=PPOConfig(micro_batch_tokens=4096))
    with (
        address_space_of_at_most_another(1 << 28),
        pytest.raises(RunFault) as raised,
        Watch(config).phase("learning step 7"),
        doing("updating the policy network by micro-batches: 3, tokens of the largest: 4,000"),
    ):
        torch.zeros(1 << 30)
    assert str(raised.value) == (
        "out of memory while learning step 7 (updating the policy network by micro-batches: 3, tokens of the "
        "largest: 4,000): lower ppo.micro_batch_tokens = 4096, or raise parallel.tensor = 1; "
        "the same command continues from the last checkpoint"
    )


@pytest.mark.parametrize(
    ("phase", "setting"),
    [("sampling step 1", "rollout.slots = 128"), ("evaluating (start)", "rollout.slots = 128")],
)
def test_what_to_lower_depends_on_the_phase(phase: str, setting: str) -> None:
    message = f"^out of memory while {re.escape(phase)}: lower {setting}"
    with pytest.raises(RunFault, match=message), Watch(Config()).phase(phase):
        raise MemoryError


def test_a_gpu_out_of_memory_is_known_and_other_errors_are_not() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert is_out_of_memory(OSError(errno.ENOMEM, "Cannot allocate memory"))
    assert not is_out_of_memory(RuntimeError("shapes do not match"))


def test_an_error_of_ours_keeps_its_type_and_carries_what_was_being_done() -> None:
    with (
        pytest.raises(RuntimeError, match="shapes do not match") as raised,
        Watch(Config()).phase("learning step 1"),
        doing("scoring"),
    ):
        raise RuntimeError("shapes do not match")
    assert not isinstance(raised.value, RunFault)
    assert raised.value.__notes__ == ["scoring"]


def test_a_full_disk_names_the_file() -> None:
    message = r"^/run/metrics.jsonl cannot be written \(No space left on device\) while recording step 2: "
    with pytest.raises(RunFault, match=message), Watch(Config()).phase("recording step 2"):
        raise OSError(errno.ENOSPC, "No space left on device", "/run/metrics.jsonl")


@given(most=st.integers(1, 4), skipped=st.lists(st.booleans(), max_size=12))
def test_so_many_skipped_updates_in_a_row_are_too_many_and_one_fewer_is_not(
    most: int, skipped: list[bool]
) -> None:
    counted = SkippedInARow(most)
    ends = ["".join("x" if each else "." for each in skipped[: n + 1]) for n in range(len(skipped))]
    for end, each in zip(ends, skipped, strict=True):
        counted.add("value", skipped=False)  # the other network's do not break the row
        if end.endswith("x" * most):
            with pytest.raises(SkippedTooOftenError, match=f"{most} updates of the policy network in a row"):
                counted.add("policy", skipped=each)
            return
        counted.add("policy", skipped=each)


def test_a_network_that_learns_nothing_more_ends_the_run_with_its_last_checkpoint(
    tmp_path: Path, random_model: Path
) -> None:
    """A reward beyond float32 makes every gradient NaN: two updates a step, so the third ends step 2."""
    settings = (f"model.path={random_model}", "rewards.failed=-1e39", "checkpoint.every_steps=1")
    with pytest.raises(RunFault) as raised:
        run_here(tmp_path, "run.steps=9", "run.max_skipped_updates=3", *settings)
    run = tmp_path / "small"
    assert str(raised.value).startswith("step 2: 3 updates of the policy network in a row had a gradient")
    assert f"the last checkpoint is {run / 'checkpoints' / 'step-000001'};" in str(raised.value)
    assert [path.name for path in (run / "checkpoints").glob("step-*")] == ["step-000001"]
    assert [line["step"] for line in read_lines(run / "metrics.jsonl")] == [1]


def test_the_slowest_is_the_one_that_is_slow_before_the_one_with_more_seconds() -> None:
    found = slowest({"sampling": [10.0, 14.0, 10.0], "executing": [0.5, 0.5, 3.0]})
    assert (found.rank, found.phase, found.ratio, found.is_slow) == (2, "executing", 6.0, True)


def test_of_two_processes_the_faster_one_is_the_measure() -> None:
    assert slowest({"sampling": [1.0, 3.0]}).is_slow
    assert not slowest({"sampling": [2.0, 3.0]}).is_slow
    assert not slowest({"sampling": [0.1, 0.9]}).is_slow  # less than a second


def find_the_sleeper() -> str:
    parallel = initialize(ParallelConfig(processes=3))
    pace = Pace(parallel.device)
    started = time.monotonic()
    time.sleep(1.2 if parallel.rank == 1 else 0.1)
    return pace.describe(pace.compare({"scoring": 0.1, "sampling": time.monotonic() - started}))


@pytest.mark.multiprocess
def test_a_rank_that_sleeps_is_named_with_its_host_and_phase(tmp_path: Path) -> None:
    lines = run_ranks(find_the_sleeper, ranks=3, folder=tmp_path)
    assert len(set(lines)) == 1
    assert lines[0].startswith(f"rank 1 on {socket.gethostname()} is slow: sampling took it ")


def wait_for_one_that_hangs() -> str:
    config = Config(parallel=ParallelConfig(processes=2, timeout_s=2))
    rank = initialize(config.parallel).rank
    watch = Watch(config)
    with watch.phase("sampling step 4"):
        dist.barrier()
        if rank == 1:
            time.sleep(4)
            return ""
    with pytest.raises(RunFault) as raised, watch.phase("sharing the episodes of step 4"):
        dist.all_gather_object([None, None], "mine")
    return str(raised.value)


@pytest.mark.multiprocess
def test_a_process_that_waits_in_vain_says_for_whom_and_where_that_one_was_last(tmp_path: Path) -> None:
    line, _ = run_ranks(wait_for_one_that_hangs, ranks=2, folder=tmp_path)
    assert line.startswith(
        "waited in vain while sharing the episodes of step 4 (parallel.timeout_s = 2 s), for "
        f"rank 1 on {socket.gethostname()} (sampling step 4): "
    )


def lose_one() -> str:
    config = Config(parallel=ParallelConfig(processes=2))
    rank = initialize(config.parallel).rank
    dist.barrier()
    if rank == 1:
        dist.destroy_process_group()
        return ""
    with pytest.raises(RunFault) as raised, Watch(config).phase("learning step 1"):
        dist.all_reduce(torch.zeros(1))
    return str(raised.value)


def test_a_process_that_meets_nobody_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        place = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        for name, value in (place | {"MASTER_PORT": str(nobody.getsockname()[1])}).items():
            monkeypatch.setenv(name, value)
        config = Config(parallel=ParallelConfig(processes=2, timeout_s=1))
        message = r"\(parallel.timeout_s = 1 s\), for processes that have not joined, or rank 0"
        with pytest.raises(RunFault, match=message), Watch(config).phase("starting or stopping"):
            initialize(config.parallel)


@pytest.mark.multiprocess
def test_a_process_that_lost_another_says_so(tmp_path: Path) -> None:
    line, _ = run_ranks(lose_one, ranks=2, folder=tmp_path)
    assert line.startswith("lost another process while learning step 1: see what that one said")


def test_a_command_that_meets_a_fault_says_one_line_and_ends_with_1(
    tmp_path: Path, random_model: Path
) -> None:
    """No episodes' cache of a billion rows fits the address space."""
    arguments = ("train", str(run_file(tmp_path)), f"model.path={random_model}", "rollout.slots=1000000000")
    with nothing_left_behind():
        command = Command(["rlef", *arguments], tmp_path / "log")
        assert command.wait() == 1
    (line,) = command.output.splitlines()
    assert line.startswith("rlef: error: out of memory while starting")
    assert "lower rollout.slots = 1000000000 or ppo.micro_batch_tokens = 16384" in line


@pytest.mark.multiprocess
@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "line"),
    [
        ("memory", "rank 1 on {host}: out of memory while learning step 1: lower ppo.micro_batch_tokens"),
        (
            "sleep",
            "rank 0 on {host}: waited in vain while sharing the episodes of step 1 (parallel.timeout_s = 4",
        ),
        (
            "pause",
            "rank 0 on {host}: waited in vain while agreeing whether to go on (parallel.timeout_s = 4",
        ),
    ],
)
def test_a_fault_of_one_process_ends_the_others_of_its_run(
    fault: str, line: str, tmp_path: Path, random_model: Path
) -> None:
    with nothing_left_behind():
        command = Command(["tests.faulty_run", str(tmp_path), str(random_model), fault], tmp_path / "log")
        assert command.wait(timeout_s=120) in (1, TOLD)
    told = [each for each in command.output.splitlines() if each.startswith("rlef: error: ")]
    assert any(each.startswith("rlef: error: " + line.format(host=socket.gethostname())) for each in told)
    assert "Traceback" not in command.output
