"""The batch script, with commands in the place of Slurm's that run one node: this one."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.small_runs import ROOT, Command, children, nothing_left_behind, read_lines, run_file

SCRIPT = ROOT / "configs" / "slurm" / "train.sbatch"

SRUN = """#!/bin/bash
echo "srun $*" >> "$SLURM_LOG"
while [[ $1 == --* ]]; do shift; done
"$@" &
trap 'kill -KILL $!' TERM HUP  # as Slurm's own does
wait $!
exit $?
"""

SCONTROL = """#!/bin/bash
echo "scontrol $*" >> "$SLURM_LOG"
if [[ $1 == show ]]; then echo localhost; fi
"""


def slurm(folder: Path) -> dict[str, str]:
    """What a job of one node and one process finds in its environment."""
    commands = folder / "commands"
    commands.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    (folder / "slurm").touch()
    return {
        "PATH": os.pathsep.join([str(commands), str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": str(ROOT),
        "SLURM_LOG": str(folder / "slurm"),
        "TMPDIR": str(folder),
        "SLURM_JOB_ID": str(os.getpid()),  # which the port depends on
        "SLURM_JOB_NODELIST": "node",
        "SLURM_NNODES": "1",
        "PROCESSES_PER_NODE": "1",
    }


def run_to_its_end(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        env=os.environ | slurm(folder),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def test_what_the_user_must_mend_is_said_once_and_nothing_is_launched(tmp_path: Path) -> None:
    done = run_to_its_end(tmp_path, str(run_file(tmp_path)), "run.sede=1")
    assert done.returncode == 2
    assert done.stderr == "rlef: error: unknown setting 'run.sede'; did you mean 'run.seed'?\n"
    assert (tmp_path / "slurm").read_text() == "scontrol show hostnames node\n"


def test_a_job_without_a_run_file_says_how_to_give_one(tmp_path: Path) -> None:
    done = run_to_its_end(tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: sbatch --nodes N ")


def test_launches_that_fail_are_counted(tmp_path: Path) -> None:
    environment = slurm(tmp_path)
    for name, text in (("srun", SRUN.replace('"$@" &', "exit 7")), ("rlef", "#!/bin/bash\n")):
        (tmp_path / "commands" / name).write_text(text)
        (tmp_path / "commands" / name).chmod(0o755)
    done = subprocess.run(
        ["bash", str(SCRIPT), "run.toml"], env=os.environ | environment, stderr=subprocess.PIPE
    )
    assert done.returncode == 7
    told = done.stderr.decode().splitlines()
    assert told == [f"launch {number} of 3 ended with status 7" for number in (1, 2, 3)]
    launched = re.findall(r"--rdzv-id \S+-(\d) ", (tmp_path / "slurm").read_text())
    assert launched == ["1", "2", "3"]


@pytest.mark.multiprocess
@pytest.mark.slow
def test_a_job_outlives_its_torchrun_and_when_out_of_time_saves_and_is_queued_again(tmp_path: Path) -> None:
    """No process outlives the torchrun that is killed, or the next launch would find its run under way.

    Slurm may signal the processes beside their torchrun, which passes the signal on: they hear it twice.
    """
    with nothing_left_behind():
        command = Command(
            [str(SCRIPT), str(run_file(tmp_path)), "run.steps=10000", "checkpoint.every_steps=1"],
            tmp_path / "log",
            program=["bash"],
            environment=slurm(tmp_path),
        )
        command.wait_until_step(2)
        os.kill(torchrun_of(command), signal.SIGKILL)
        reached = int(re.findall(r"^step (\d+)/", command.output, re.MULTILINE)[-1])
        command.wait_until_step(reached + 2)
        torchrun = torchrun_of(command)
        assert (tmp_path / f"rlef-{os.getpid()}.pid").read_text() == f"{torchrun}\n"
        for rank in children(torchrun):
            os.kill(rank, signal.SIGTERM)
        time.sleep(0.1)
        command.process.terminate()
        assert command.wait() == 0, command.output
    stopped = len(read_lines(tmp_path / "small" / "metrics.jsonl"))
    assert "launch 1 of 3 ended with status 137\ncontinuing the unfinished run in " in command.output
    assert f"stopped and saved after step {stopped} of 10000; --resume auto continues" in command.output
    assert "rlef: error" not in command.output
    assert (tmp_path / "slurm").read_text().splitlines()[-1] == f"scontrol requeue {os.getpid()}"


def torchrun_of(command: Command) -> int:
    """The child of srun, which is the script's only one that waits for something."""
    (found,) = [child for srun in children(command.process.pid) for child in children(srun)]
    return found
