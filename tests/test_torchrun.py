"""Runs under torchrun: what it starts again, after a kill or a cut cable, ends as if nothing had happened."""

from __future__ import annotations

import json
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.networks import LINK, Node, two_nodes
from tests.small_runs import NO_LEARNED_ORDER, Command, nothing_left_behind, run_file, untimed
from tests.test_train import differences, saved

STEPS = 4
SETTINGS = (f"run.steps={STEPS}", "checkpoint.every_steps=1", "checkpoint.keep=9", NO_LEARNED_ORDER)
ONE_NODE = ("--nproc-per-node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0")
OWN_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
TIMEOUT_S = 20
AGENTS_WAIT_S = 300  # for a node that is away

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes that is left in peace."""
    folder = tmp_path_factory.mktemp("whole")
    arguments = ["tests.elastic", *ONE_NODE, "-m", "rlef.cli", "train", str(run_file(folder)), *SETTINGS]
    with nothing_left_behind():
        command = Command([*arguments, "run.name=whole"], folder / "log")
        assert command.wait() == 0, command.output
    return folder / "whole"


def assert_nothing_shows(run: Path, whole: Path) -> None:
    """Weights, moments, metrics and final figures, bit for bit; and each step is logged once."""
    assert differences(saved(whole, STEPS), saved(run, STEPS)) == []
    assert differences(saved(run, 1), saved(run, STEPS)) != []
    found, expected = (untimed(each) for each in (run, whole))
    assert [line["step"] for line in found] == list(range(1, STEPS + 1))
    assert found == expected
    figures, wanted = (json.loads((each / "summary.json").read_text()) for each in (run, whole))
    for phase in ("start", "final"):
        del figures[phase]["seconds"], wanted[phase]["seconds"]
        assert figures[phase] == wanted[phase]


def errors(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("rlef: error: ")]


@dataclass(frozen=True)
class Killed:
    run: Path
    status: int
    output: str


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Killed:
    """One torchrun; a rank is killed while it samples, another while it learns, and one while it saves."""
    folder = tmp_path_factory.mktemp("killed")
    arguments = ["tests.elastic", *ONE_NODE, "--max-restarts", "3", "-m", "tests.killed_run"]
    arguments += ["train", str(run_file(folder)), "--resume", "never", "run.name=killed", *SETTINGS]
    arguments += ["checkpoint.asynchronous=false"]  # else what the others do at the third kill is chance
    with nothing_left_behind():
        command = Command(arguments, folder / "log", environment=OWN_STORE)
        status = command.wait()
    return Killed(folder / "killed", status, command.output)


def test_a_rank_that_is_killed_is_started_again_and_nothing_of_it_shows(killed: Killed, whole: Path) -> None:
    assert killed.status == 0, killed.output
    assert_nothing_shows(killed.run, whole)


def test_what_an_attempt_wrote_is_not_thrown_away_by_resume_never(killed: Killed) -> None:
    continued = f"continuing the unfinished run in {killed.run}"
    assert killed.output.splitlines().count(continued) == 3
    assert [path.name for path in killed.run.parent.iterdir() if path.is_dir()] == ["killed"]


def test_each_attempt_says_once_that_a_process_was_lost_and_doing_what(killed: Killed) -> None:
    lost = [re.search(r"lost another process while (\w+)", line) for line in errors(killed.output)]
    assert [found and found[1] for found in lost] == ["sharing", "learning", "saving"]


def test_a_run_that_its_torchrun_has_finished_is_not_started_anew(killed: Killed, whole: Path) -> None:
    """As when a rank dies on its way out: its torchrun starts all again, with the same command."""
    from rlef.run_folder import open_run_folder
    from rlef.settings_file import load_config

    launchers = json.loads((killed.run / ".launch.json").read_text())["launchers"]
    config = load_config(run_file(killed.run.parent), ("run.name=killed", "parallel.processes=2", *SETTINGS))
    folder, note = open_run_folder(config, resume="auto", launchers=launchers)
    assert folder.is_finished
    assert note == f"the run in {killed.run} is finished"


@dataclass(frozen=True)
class CutOff:
    run: Path
    first: str  # what the nodes said: the one that the agents meet on,
    second: str  # and the one that is cut off
    seconds: float  # until both attempts had ended
    sent: int  # bytes over the link before that
    statuses: list[int]


@pytest.fixture(scope="module")
def cut_off(tmp_path_factory: pytest.TempPathFactory) -> CutOff:
    """Two torchruns, each in a network of its own. The link between them is cut, and comes back."""
    folder = tmp_path_factory.mktemp("nodes")
    settings = run_file(folder)

    def start(node: Node, *, is_host: bool) -> Command:
        conf = f"is_host={is_host},read_timeout={4 * TIMEOUT_S},join_timeout={AGENTS_WAIT_S}"
        arguments = ["tests.elastic", "--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "9"]
        arguments += ["--rdzv-backend", "c10d", "--rdzv-id", "nodes", "--rdzv-conf", conf]
        arguments += ["--rdzv-endpoint", f"{nodes[0].address}:29500", "--local-addr", node.address]
        arguments += ["-m", "rlef.cli", "train", str(settings), "run.name=nodes", *SETTINGS]
        return Command(
            [*arguments, f"parallel.timeout_s={TIMEOUT_S}"],
            folder / f"log-{node.address}",
            program=node.inside(sys.executable, "-m"),
            environment=OWN_STORE | {"GLOO_SOCKET_IFNAME": LINK},
        )

    with two_nodes() as nodes, nothing_left_behind():
        first, second = start(nodes[0], is_host=True), start(nodes[1], is_host=False)
        first.wait_until_step(2)
        sent = nodes[0].bytes_sent()
        nodes[1].cut_off()
        cut = time.monotonic()
        wait_for_errors(first, second)
        seconds = time.monotonic() - cut
        nodes[1].come_back()
        statuses = [first.wait(), second.wait()]
    return CutOff(folder / "nodes", first.output, second.output, seconds, sent, statuses)


def wait_for_errors(*commands: Command) -> None:
    deadline = time.monotonic() + 4 * TIMEOUT_S
    while not all(errors(command.output) for command in commands):
        assert time.monotonic() < deadline, [command.output for command in commands]
        time.sleep(0.05)


def test_a_node_that_was_cut_off_and_came_back_leaves_no_trace(cut_off: CutOff, whole: Path) -> None:
    assert cut_off.statuses == [0, 0], cut_off.first + cut_off.second
    assert cut_off.sent > 1_000_000  # gradients went over the link
    assert_nothing_shows(cut_off.run, whole)
    assert f"continuing the unfinished run in {cut_off.run}" in cut_off.first


def test_both_sides_of_a_cut_end_their_attempt_in_time_and_name_whom_they_waited_for(cut_off: CutOff) -> None:
    for output, waited_for in (
        (cut_off.first, "rank 1 on "),
        (cut_off.second, "rank 0, which does not answer"),
    ):
        line = errors(output)[0]
        assert f"(parallel.timeout_s = {TIMEOUT_S} s), for {waited_for}" in line
    assert cut_off.seconds < 2 * TIMEOUT_S + 10


def test_restarts_that_would_find_the_store_of_the_attempt_before_are_refused(tmp_path: Path) -> None:
    """Each attempt says so: torchrun starts again whatever the status."""
    arguments = ["torch.distributed.run", "--standalone", "--nproc-per-node", "1", "--max-restarts", "1"]
    with nothing_left_behind():
        command = Command([*arguments, "-m", "rlef", "train", str(run_file(tmp_path))], tmp_path / "log")
        assert command.wait() == 1
    line = (
        "rlef: error: torchrun --max-restarts 1 would start processes that look for ended ones: export "
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 on each node, with --standalone or --rdzv-backend c10d"
    )
    assert errors(command.output) == [line, line]
    assert not (tmp_path / "small").exists()
