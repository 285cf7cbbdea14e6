"""Runs of seconds, and the processes that make them, watched so that none is left behind."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from rlef.config import Config
from rlef.settings_file import load_config

ROOT = Path(__file__).parent.parent
_PR_SET_CHILD_SUBREAPER = 36

# An epsilon this large makes AdamW move a weight by about its gradient, so that what differs by rounding in
# the gradient differs by rounding in the weight; a small one moves it by the sign of the rounding alone.
SETTINGS = """
[run]
name = "small"
steps = 2

[problems]
train_size = 32
eval_size = 2

[rollout]
episodes_per_step = 8
turns = 2
max_prompt_tokens = 64
max_feedback_tokens = 112
max_test_characters = 80
max_response_tokens = 40
slots = 8

[executor]
workers = 1

[ppo]
updates_per_step = 2

[optimizer]
lr = 0.3
value_lr = 0.3
eps = 1.0
warmup_updates = 2
weight_decay = 0.0

[evaluation]
turns = 2
rollouts_per_problem = 1
bootstrap_samples = 2
"""


def run_file(folder: Path) -> Path:
    """The settings of a small run, which writes into `folder`."""
    path = folder / "small.toml"
    path.write_text(SETTINGS.replace("[run]", f'[run]\noutput_dir = "{folder}"'), encoding="utf-8")
    return path


def small_config(folder: Path, *overrides: str) -> Config:
    return load_config(run_file(folder), overrides)


@contextlib.contextmanager
def one_process_job() -> Iterator[None]:
    """This process may be a job inside, and another one afterwards."""
    from rlef.megatron_policy import leave

    yield
    leave()


def run_here(folder: Path, *overrides: str, resume: str = "never") -> Path:
    """A run of one process, this one; its folder."""
    from rlef.run_folder import open_run_folder
    from rlef.train import train

    config = small_config(folder, *overrides)
    opened, _ = open_run_folder(config, resume=resume)
    with one_process_job():
        assert train(config, opened) == 0
    return opened.path


def saved(run: Path, step: int) -> dict[str, Tensor]:
    """Every whole tensor of a checkpoint by network, kind and name, put together from the pieces as they lie
    in the files."""
    parts: dict[str, list[tuple[list[int], Tensor]]] = {}
    for file in (run / "checkpoints" / f"step-{step:06d}").glob("*.safetensors"):
        for key, part in load_file(file).items():
            name, offsets = key.rsplit("@", 1)
            parts.setdefault(name, []).append(([int(offset) for offset in offsets.split(",")], part))
    whole: dict[str, Tensor] = {}
    for name, pieces in parts.items():
        ends = [[offset + size for offset, size in zip(at, part.shape, strict=True)] for at, part in pieces]
        whole[name] = torch.full([max(end) for end in zip(*ends, strict=True)], torch.nan)
        for at, part in pieces:
            slices = (slice(offset, offset + size) for offset, size in zip(at, part.shape, strict=True))
            whole[name][tuple(slices)] = part
    return whole


def read_lines(path: Path) -> list[dict[str, float]]:
    """Whole lines only: the last one may be under way."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


NO_LEARNED_ORDER = "executor.learn_order=false"  # which measures tests, so that no two runs run as many


def untimed(run: Path) -> list[dict[str, float]]:
    """A run's metrics, without those that say how long something took. To be equal they want
    `NO_LEARNED_ORDER`."""

    def is_time(name: str) -> bool:
        return name.startswith(("seconds", "slowest_rank", "executor/")) or name.endswith("_per_s")

    lines = read_lines(run / "metrics.jsonl")
    return [{name: value for name, value in line.items() if not is_time(name)} for line in lines]


class Command:
    """A command in a session of its own, as a terminal starts it."""

    def __init__(
        self,
        arguments: Sequence[str],
        log: Path,
        *,
        program: Sequence[str] = (sys.executable, "-m"),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """`environment` is set besides."""
        self._log = log
        without_job = {
            name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")
        }
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [*program, *arguments],
                env=without_job | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | dict(environment or {}),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")

    def wait(self, timeout_s: float = 600.0) -> int:
        return self.process.wait(timeout_s)

    def wait_until_step(self, step: int, timeout_s: float = 600.0) -> None:
        """Until the run has shown this step or a later one; it must still be running then."""
        deadline = time.monotonic() + timeout_s
        while not any(int(shown) >= step for shown in re.findall(r"^step (\d+)/", self.output, re.MULTILINE)):
            assert self.process.poll() is None, f"ended before step {step}:\n{self.output[-4000:]}"
            assert time.monotonic() < deadline, f"has not reached step {step}:\n{self.output[-4000:]}"
            time.sleep(0.005)

    def ranks(self) -> list[int]:
        """Process ids of the ranks, in their order."""
        spawned = [pid for pid in children(self.process.pid) if b"spawn_main" in _command_line(pid)]
        return sorted(spawned)

    def press_ctrl_c(self) -> None:
        os.killpg(self.process.pid, signal.SIGINT)


@contextlib.contextmanager
def nothing_left_behind(grace_s: float = 10.0) -> Iterator[None]:
    """What is started inside must have ended, down to the last descendant, when the inside ends.

    Orphans, whatever session or namespace they moved to, become children of this process meanwhile.
    """
    before = set(children(os.getpid()))
    _adopt_orphans(True)
    try:
        yield
        deadline = time.monotonic() + grace_s
        while left := _living(set(children(os.getpid())) - before):
            assert time.monotonic() < deadline, f"left behind: {[_command_line(pid) for pid in left]}"
            time.sleep(0.02)
    finally:
        for pid in _living(set(children(os.getpid())) - before):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        _adopt_orphans(False)


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Writes beyond `size` bytes fail inside, as they do on a full disk, but for the number of the error."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def children(parent: int) -> list[int]:
    """Process ids, from /proc."""
    found: list[int] = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if int(status.read_text().rpartition(")")[2].split()[1]) == parent:
                found.append(int(status.parent.name))
    return found


def _living(pids: set[int]) -> set[int]:
    """Those that have not ended; the ended ones are reaped."""
    living: set[int] = set()
    for pid in pids:
        with contextlib.suppress(ChildProcessError):
            if os.waitpid(pid, os.WNOHANG) == (0, 0):
                living.add(pid)
    return living


def _command_line(pid: int) -> bytes:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def _adopt_orphans(adopt: bool) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, int(adopt), 0, 0, 0)
