"""An engine over two ranks, a stand-in for vLLM's, beside a process that learns: real processes over gloo."""

from __future__ import annotations

import re
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rlef import own_rollouts
from rlef.config import Config, ParallelConfig, RolloutConfig, VllmConfig
from tests import engine_examples
from tests.distributed import common_folder, run_ranks
from tests.engine_examples import ONE_ENGINE, RankOfEngine
from tests.small_runs import Command, nothing_left_behind, untimed
from tests.test_sampling import Played, content, play

pytestmark = pytest.mark.multiprocess


@dataclass(frozen=True)
class Seen:
    """A run as one process saw it, with its calls of the engine."""

    played: Played
    calls: list[tuple[object, ...]]


def see(name: str, *settings: str) -> Seen:
    built: list[RankOfEngine] = []

    def build(*arguments: Any, **options: Any) -> RankOfEngine:
        built.append(engine_examples.build(*arguments, **options))
        return built[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(own_rollouts, "build_sampler", build)
        played = play(common_folder(), name, *ONE_ENGINE, *settings)
    return Seen(played, built[0].calls if built else [])


def as_three() -> dict[str, Seen]:
    return {
        "lockstep": see("lockstep"),
        "stale": see("stale", "rollout.max_staleness=1", "evaluation.every_steps=1"),
    }


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Seen]]:
    """By run, what each rank saw: the learner, the leader, the follower."""
    of_ranks = run_ranks(as_three, ranks=3, folder=tmp_path_factory.mktemp("engine"), timeout_s=1200)
    return {name: [each[name] for each in of_ranks] for name in of_ranks[0]}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Played:
    return play(tmp_path_factory.mktemp("alone"), "alone")


@pytest.mark.parametrize("run", ["lockstep", "stale"])
def test_a_follower_makes_every_call_of_its_leader_in_the_same_order_with_the_same_weights(
    seen: dict[str, list[Seen]], run: str
) -> None:
    _, leader, follower = seen[run]
    assert follower.calls == leader.calls
    versions = [call[1] for call in leader.calls if call[0] == "push"]
    assert versions == [0, 1, 2, 3]
    sums = [call[2] for call in leader.calls if call[0] == "push"]
    assert len(set(sums)) == len(sums)
    names = {call[0] for call in leader.calls}
    assert names >= ({"submit", "step", "abort"} if run == "stale" else {"generate"})


def test_a_run_whose_sampler_spans_two_ranks_is_bit_for_bit_that_of_one_process(
    seen: dict[str, list[Seen]], alone: Played
) -> None:
    played = seen["lockstep"][0].played
    assert [content(step) for step in played.steps] == [content(step) for step in alone.steps]
    assert untimed(played.path) == untimed(alone.path)


def test_weights_arrive_while_responses_of_the_engine_are_under_way(seen: dict[str, list[Seen]]) -> None:
    played = seen["stale"][0].played
    for step, episodes in enumerate(played.steps):
        assert {step - version for each in episodes for version in each.versions if version >= 0} <= {0, 1}
    names = [call[0] for call in seen["stale"][1].calls]
    push = [index for index, name in enumerate(names) if name == "push"][1]
    assert "step" in names[:push]
    assert "step" in names[push:]


@dataclass(frozen=True)
class Ended:
    """What a run said that ended by its follower's fault, and what that line begins and ends with."""

    lines: list[str]
    host: str


@pytest.fixture
def ended(request: pytest.FixtureRequest, tmp_path: Path, random_model: Path) -> Ended:
    with nothing_left_behind():
        arguments = ["tests.engine_examples", str(tmp_path), str(random_model), request.param]
        command = Command(arguments, tmp_path / "log")
        assert command.wait() != 0
    assert "Traceback" not in command.output
    lines = [line for line in command.output.splitlines() if line.startswith("rlef: error: ")]
    return Ended(lines, re.escape(socket.gethostname()))


@pytest.mark.parametrize(
    ("ended", "said"),
    [
        ("memory", "out of memory while evaluating: lower rollout.slots = 8"),
        pytest.param(
            "other tokens",
            "this rank has not sampled what rank 1, which leads its engine, has: ",
            marks=pytest.mark.slow,
        ),
    ],
    indirect=["ended"],
)
def test_a_followers_fault_ends_the_run_and_is_told_once_by_itself(ended: Ended, said: str) -> None:
    (line,) = ended.lines
    assert re.match(f"rlef: error: rank 2 on {ended.host}: {re.escape(said)}", line)


@pytest.mark.parametrize(
    ("ended", "said"),
    [
        ("killed", "the process has ended; see what it said"),
        pytest.param("hung", r"no sign of life since \d\d:\d\d:\d\d", marks=pytest.mark.slow),
    ],
    indirect=["ended"],
)
def test_a_follower_that_is_gone_ends_the_run_and_is_named(ended: Ended, said: str) -> None:
    named = rf"rlef: error: rank [01] on {ended.host}: lost rank 2 on {ended.host} \(.+\) while .+: {said}"
    assert any(re.match(named, line) for line in ended.lines), ended.lines


def test_samplers_share_episodes_by_engines_and_each_has_its_leader() -> None:
    config = Config(
        parallel=ParallelConfig(processes=6, sampling_processes=4),
        rollout=RolloutConfig(sampler="vllm"),
        vllm=VllmConfig(tensor_parallel=2),
    )
    assert (config.engine_ranks, config.engines) == (2, 2)
    embedded = config.model_copy(update={"rollout": RolloutConfig()})
    assert (embedded.engine_ranks, embedded.engines) == (1, 4)
    colocated = config.model_copy(update={"parallel": ParallelConfig()})
    assert (colocated.engine_ranks, colocated.engines) == (1, 1)
