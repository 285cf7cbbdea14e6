"""Which cores the programs of each process get, and what is refused."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlef.config import ConfigError, ExecutorConfig
from rlef.execution import open_executor, share_of_cores


@given(data=st.data(), available=st.sets(st.integers(0, 300), min_size=1, max_size=64))
def test_the_processes_of_a_machine_share_the_budget_without_rest_and_without_overlap(
    data: st.DataObject, available: set[int]
) -> None:
    cores = data.draw(st.integers(1, len(available)))
    processes = data.draw(st.integers(1, cores))
    settings = ExecutorConfig(cores=cores)
    shares = [
        share_of_cores(settings, available, processes=processes, index=index) for index in range(processes)
    ]
    assert all(shares)
    assert [core for share in shares for core in share or ()] == sorted(available)[-cores:]
    sizes = {len(share or ()) for share in shares}
    assert max(sizes) - min(sizes) <= 1


def test_without_a_budget_no_core_is_kept_apart() -> None:
    assert share_of_cores(ExecutorConfig(), {0, 1}, processes=2, index=0) is None


@pytest.mark.parametrize(
    ("cores", "message"),
    [
        (9, r"executor.cores = 9, but a process may use 8 of this machine's cores; lower it"),
        (3, r"executor.cores = 3 cannot be shared by 4 processes of one machine; raise it to 4"),
    ],
)
def test_a_budget_that_cannot_be_given_or_shared_is_refused(cores: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        share_of_cores(ExecutorConfig(cores=cores), range(8), processes=4, index=0)


def test_a_process_opens_a_worker_for_each_core_of_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    available = sorted(os.sched_getaffinity(0))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(len(available)))
    monkeypatch.setenv("LOCAL_RANK", "0")
    with open_executor(ExecutorConfig(cores=len(available))) as executor:
        assert [os.sched_getaffinity(pid) for pid in executor.worker_pids()] == [{available[0]}]
    with open_executor(ExecutorConfig(cores=len(available), workers=2)) as executor:
        assert [os.sched_getaffinity(pid) for pid in executor.worker_pids()] == [{available[0]}] * 2
