"""The launcher: every child knows its place, and none outlives the parent. No torch is needed for that."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlef.config import ConfigError
from rlef.launch import free_port, launched_by_torchrun, require_restartable, run_processes
from tests.small_runs import ROOT, Command, nothing_left_behind

_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def write_place(folder: Path) -> int:
    place = " ".join(os.environ[name] for name in _TORCHRUN[:4])
    (folder / os.environ["RANK"]).write_text(f"{place} on {os.environ['OMP_NUM_THREADS']} threads")
    return 0


def fail_on_rank_1(status: int) -> int:
    if os.environ["RANK"] == "1":
        return status
    time.sleep(600)
    return 0


def end_by_signal(number: int) -> int:
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), number)
    time.sleep(600)
    return 0


def leave_when_asked(folder: Path) -> int:
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
    ready(folder)
    while not asked:
        time.sleep(0.01)
    (folder / f"saved-{os.environ['RANK']}").touch()
    return 0


def never_leave(folder: Path) -> int:
    signal.signal(signal.SIGTERM, lambda *_: (folder / f"asked-{os.environ['RANK']}").touch())
    ready(folder)
    while True:
        time.sleep(0.01)


def not_prepared(folder: Path) -> int:
    ready(folder)
    time.sleep(600)
    return 0


def ready(folder: Path) -> None:
    (folder / f"ready-{os.environ['RANK']}").touch()


def wait_for(*paths: Path) -> None:
    deadline = time.monotonic() + 60
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline, f"none of {paths} came"
        time.sleep(0.01)


def launch(target: str, folder: Path) -> Command:
    """`run_processes` of two children in a process of its own, once both are ready."""
    command = Command(["tests.test_launch", target, str(folder)], folder / "log")
    wait_for(folder / "ready-0", folder / "ready-1")
    return command


def test_one_process_is_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert run_processes(os.getpid, (), processes=1, threads=3) == os.getpid()
    assert os.environ["OMP_NUM_THREADS"] == "3"


def test_each_process_knows_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert run_processes(write_place, (tmp_path,), processes=2, threads=3) == 0
    places = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert places == {"0": "0 0 2 2 on 3 threads", "1": "1 1 2 2 on 3 threads"}


def test_a_job_of_torchrun_is_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in _TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    assert not launched_by_torchrun()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert launched_by_torchrun()


def test_processes_of_one_torchrun_know_it_by_the_same_name() -> None:
    program = [sys.executable, "-c", "from rlef.launch import torchrun_agent; print(torchrun_agent())"]
    started = [subprocess.run(program, cwd=ROOT, capture_output=True, text=True).stdout for _ in range(2)]
    nested = [sys.executable, "-c", f"import subprocess; subprocess.run({program!r})"]
    by_another = subprocess.run(nested, cwd=ROOT, capture_output=True, text=True).stdout
    assert started[0] == started[1] != by_another
    assert f" {os.getpid()} " in started[0]


def test_restarts_want_a_store_for_each_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "0")
    require_restartable()
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "2")
    with pytest.raises(ConfigError, match=r"^torchrun --max-restarts 2 would start processes that look for"):
        require_restartable()
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    require_restartable()


def test_the_first_failure_is_the_status_and_ends_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert run_processes(fail_on_rank_1, (3,), processes=2, threads=1) == 3


def test_a_killed_process_is_a_failure_with_the_status_of_a_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert run_processes(end_by_signal, (signal.SIGKILL,), processes=2, threads=1) == 128 + signal.SIGKILL


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["sigterm", "sigint"])
def test_a_signal_lets_the_children_save_and_leave(tmp_path: Path, number: signal.Signals) -> None:
    with nothing_left_behind():
        command = launch("leave_when_asked", tmp_path)
        os.kill(command.process.pid, number)
        assert command.wait() == 0
    assert (tmp_path / "saved-0").exists()
    assert (tmp_path / "saved-1").exists()


def test_a_second_signal_ends_them_at_once(tmp_path: Path) -> None:
    with nothing_left_behind():
        command = launch("never_leave", tmp_path)
        command.press_ctrl_c()
        wait_for(tmp_path / "asked-0", tmp_path / "asked-1")
        command.press_ctrl_c()
        assert command.wait() == 128 + signal.SIGKILL


def test_ctrl_c_before_the_children_can_save_leaves_no_traceback(tmp_path: Path) -> None:
    with nothing_left_behind():
        command = launch("not_prepared", tmp_path)
        command.press_ctrl_c()
        assert command.wait() == 128 + signal.SIGTERM
    assert command.output == ""


def test_children_die_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    with nothing_left_behind():
        command = launch("never_leave", tmp_path)
        assert len(command.ranks()) == 2
        command.process.kill()
        assert command.wait() == -signal.SIGKILL


if __name__ == "__main__":
    from tests import test_launch

    target, folder = sys.argv[1:]
    sys.exit(run_processes(getattr(test_launch, target), (Path(folder),), processes=2, threads=1))


def test_a_port_is_chosen_that_the_kernel_gives_to_nobody_and_that_nobody_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, last = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    chosen = free_port()
    assert not first <= chosen <= last
    monkeypatch.setattr(random, "sample", lambda ports, k: [chosen, *ports])
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", chosen))
        assert free_port() != chosen
