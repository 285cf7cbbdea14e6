"""Seconds of a step: in numbers for the head, as properties, and against what others have published."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.plan_errors import errors
from rlef.arithmetic import longest_dialog
from rlef.plan_cluster import GPUS, Assumptions, Cluster
from rlef.plan_memory import Layout
from rlef.plan_model import read_model
from rlef.plan_time import (
    DecodeStep,
    StepTime,
    Workload,
    busiest_share,
    episode_lengths,
    execution_s,
    exponential_scale,
    publishing_s,
    rollout_s,
    scoring_s,
    step_time,
    updates_s,
    workload_of,
)
from rlef.settings_file import load_config

ROOT = Path(__file__).parents[1]
SIZE = read_model("llama-3.1-8b")
NODE = Cluster(gpu=GPUS["H100"], nodes=1)
ALL = Layout(tensor=2, training_gpus=8, sampling_gpus=8)
WORK = Workload(
    episodes=64,
    updates=2,
    turns=2.5,
    max_turns=3,
    prompt_tokens=500,
    response_tokens=300,
    max_response_tokens=1000,
    feedback_tokens=100,
    longest_tokens=4000,
    micro_batch_tokens=4096,
    slots=128,
)


def seconds(layout: Layout = ALL, work: Workload = WORK, cluster: Cluster = NODE, **changes: Any) -> StepTime:
    return step_time(SIZE, cluster, layout, work, replace(Assumptions(), **changes), cache_tokens=1e6)


def test_an_episode_is_its_prompt_its_responses_and_the_feedback_between_them() -> None:
    assert WORK.episode_tokens == 500 + 2.5 * 300 + 1.5 * 100
    assert WORK.read_tokens == 500 + 1.5 * 100


def test_mean_lengths_are_shares_of_the_limits_of_the_run_file() -> None:
    config = load_config(ROOT / "configs" / "tiny.toml")
    work = workload_of(
        config, Assumptions(prompt_share=0.5, turn_share=1.0), longest_tokens=longest_dialog(config)
    )
    assert (work.prompt_tokens, work.turns, work.longest_tokens) == (32, 3, longest_dialog(config))
    assert (work.episodes, work.updates, work.micro_batch_tokens) == (256, 4, 4096)


@given(st.floats(1, 1e4), st.floats(1.01, 100))
def test_the_scale_gives_the_mean_back(mean: float, times: float) -> None:
    limit = mean * times
    scale = exponential_scale(mean, limit)
    assert scale * -math.expm1(-limit / scale) == pytest.approx(mean, rel=1e-6)


@given(st.integers(64, 500), st.floats(1, 3), st.floats(20, 500))
def test_lengths_have_the_mean_of_the_workload_and_keep_its_limit(
    count: int, turns: float, mean: float
) -> None:
    work = replace(WORK, turns=turns, response_tokens=mean)
    lengths = episode_lengths(work, count)
    one_at_its_limit = work.max_response_tokens / count
    uneven = 0.05 * turns * mean
    assert sum(lengths) / count == pytest.approx(turns * mean, abs=uneven + one_at_its_limit)
    assert max(lengths) <= math.ceil(turns) * work.max_response_tokens
    assert max(lengths) >= work.max_response_tokens


def test_responses_that_always_reach_their_limit_are_equally_long() -> None:
    work = replace(WORK, turns=1, response_tokens=1000)
    assert episode_lengths(work, 3) == [1000, 1000, 1000]


def test_a_sampler_with_one_episode_decodes_token_by_token() -> None:
    """No prompt to speak of; the one response runs to its limit."""
    work = replace(WORK, episodes=1, turns=1, prompt_tokens=1e-9, response_tokens=1000)
    layout = Layout()
    context = work.prompt_tokens + work.response_tokens / 2
    step = DecodeStep(SIZE, NODE, layout, Assumptions(), context)
    found = rollout_s(SIZE, NODE, layout, work, Assumptions(), cache_tokens=1e6)
    assert found == pytest.approx(1000 * step(1))


def test_a_decoding_step_reads_the_weights_once_for_all_its_sequences() -> None:
    step = DecodeStep(SIZE, NODE, Layout(), Assumptions(), 1000)
    assert step(1) < step(64) < 8 * step(1)


def test_half_of_the_slots_make_the_rollout_longer() -> None:
    layout = replace(ALL, sampling_gpus=1)
    few, many = (
        rollout_s(SIZE, NODE, layout, replace(WORK, slots=slots), Assumptions(), cache_tokens=1e6)
        for slots in (32, 64)
    )
    assert many < few < 2 * many


def test_a_small_cache_is_few_slots() -> None:
    layout = replace(ALL, sampling_gpus=1)
    by_cache = rollout_s(SIZE, NODE, layout, WORK, Assumptions(), cache_tokens=8 * WORK.episode_tokens)
    by_slots = rollout_s(SIZE, NODE, layout, replace(WORK, slots=8), Assumptions(), cache_tokens=1e9)
    assert by_cache == by_slots


def test_updates_of_one_gpu_take_their_operations_over_the_reached_rate() -> None:
    """One replica, so nothing is reduced; the optimiser's few bytes are the rest."""
    layout, work = Layout(), replace(WORK, episodes=640, has_value=False)
    tokens = work.episodes * work.episode_tokens
    operations = 3 * tokens * SIZE.forward_operations("logits", work.episode_tokens)
    expected = operations / (989e12 * Assumptions().training_efficiency)
    assert updates_s(SIZE, NODE, layout, work, Assumptions()) == pytest.approx(expected, rel=0.02)


def test_recomputation_costs_a_third_more() -> None:
    plain, recomputed = (
        updates_s(SIZE, NODE, Layout(recompute=recompute), WORK, Assumptions()) for recompute in (False, True)
    )
    assert recomputed / plain == pytest.approx(4 / 3, rel=0.02)


def test_scoring_is_a_forward_pass_of_each_network() -> None:
    without = replace(WORK, has_value=False, has_reference=False)
    three, one = (scoring_s(SIZE, NODE, Layout(), work, Assumptions()) for work in (WORK, without))
    assert three == pytest.approx(3 * one, rel=0.05)  # a value network has no output layer


def test_a_pipeline_waits_at_its_ends() -> None:
    """One micro-batch: each of four stages works a quarter of the time."""
    work = replace(WORK, micro_batch_tokens=10**6, has_value=False, has_reference=False)
    flat = scoring_s(SIZE, NODE, Layout(training_gpus=1), work, Assumptions())
    staged = scoring_s(SIZE, NODE, Layout(pipeline=4, training_gpus=4), work, Assumptions())
    assert staged == pytest.approx(flat, rel=0.05)


def test_an_interleaved_pipeline_waits_half_as_long_in_two_chunks() -> None:
    """Sixteen micro-batches and four stages: 16 + 3 / 2 against 16 + 3."""
    tokens = WORK.episodes / WORK.updates * WORK.episode_tokens
    work = replace(WORK, micro_batch_tokens=int(tokens / 15.5), has_value=False, has_reference=False)
    plain = Layout(pipeline=4, training_gpus=4)
    times = [
        scoring_s(SIZE, NODE, replace(plain, virtual_pipeline=chunks), work, Assumptions())
        for chunks in (1, 2)
    ]
    assert times[1] / times[0] == pytest.approx(17.5 / 19, rel=0.02)


def test_an_interleaved_pipeline_pads_to_as_many_micro_batches_for_each_stage() -> None:
    work = replace(WORK, micro_batch_tokens=10**6, has_value=False, has_reference=False)
    plain = Layout(pipeline=4, training_gpus=4)
    interleaved = scoring_s(SIZE, NODE, replace(plain, virtual_pipeline=4), work, Assumptions())
    assert interleaved > scoring_s(SIZE, NODE, plain, work, Assumptions())


@given(st.integers(1, 64), st.integers(1, 64))
def test_the_busiest_replica_never_has_less_than_its_share(sequences: int, replicas: int) -> None:
    assert busiest_share(sequences * replicas, replicas, Assumptions()) >= 1


def test_one_replica_waits_for_nobody() -> None:
    assert busiest_share(7, 1, Assumptions()) == 1


def test_sampling_hides_execution_but_for_the_tests_of_the_last_episode() -> None:
    assumptions = Assumptions(test_s=1, tests_per_turn=5, cores_per_gpu=1)
    assert execution_s(NODE, ALL, WORK, assumptions, hidden_s=0) == 64 * 2.5 * 5 / 8
    assert execution_s(NODE, ALL, WORK, assumptions, hidden_s=10) == 64 * 2.5 * 5 / 8 - 10
    assert execution_s(NODE, ALL, WORK, assumptions, hidden_s=1000) == 3 * 5
    assert execution_s(NODE, ALL, replace(WORK, executes=False), assumptions, hidden_s=0) == 0


def test_a_disaggregated_step_takes_the_longer_of_sampling_and_learning() -> None:
    time = seconds(replace(ALL, training_gpus=4, sampling_gpus=4, colocated=False))
    longer = max(time.rollout + time.execution, time.scoring + time.updates)
    assert time.total == longer + time.publishing


def test_a_colocated_step_takes_all_phases_after_each_other() -> None:
    phases = asdict(seconds())
    assert not phases.pop("overlapped")
    assert seconds().total == pytest.approx(sum(phases.values()))


def test_the_overhead_is_a_factor_on_everything() -> None:
    assert seconds(step_overhead=2.4).total == pytest.approx(2 * seconds(step_overhead=1.2).total)


def test_weights_go_to_other_nodes_over_the_network() -> None:
    away = replace(ALL, training_gpus=8, sampling_gpus=8, colocated=False)
    two = replace(NODE, nodes=2)
    slow = publishing_s(SIZE, replace(two, network_gbps=100), away, Assumptions())
    assert slow == pytest.approx(4 * publishing_s(SIZE, two, away, Assumptions()))
    assert publishing_s(SIZE, two, Layout(sampling_gpus=1), Assumptions()) == 0


@pytest.mark.parametrize("gpu", ["A100", "H100", "B200"])
def test_more_nodes_never_slow_the_forward_passes(gpu: str) -> None:
    cluster = Cluster(gpu=GPUS[gpu], nodes=4)
    times = [
        scoring_s(SIZE, cluster, replace(ALL, training_gpus=gpus), WORK, Assumptions())
        for gpus in (8, 16, 32)
    ]
    assert times == sorted(times, reverse=True)


ROWS = re.findall(
    r"^\| ([^|]+) \| (calibration|check) \| ([\d.,]+) \| ([\d.,]+) \| ([+-]\d+) % \|$",
    (ROOT / "docs" / "plan.md").read_text(encoding="utf-8"),
    flags=re.MULTILINE,
)


def test_the_errors_in_the_documentation_are_those_of_the_plan() -> None:
    """Each published figure, its prediction and the error, as `python bench/plan_errors.py` prints them."""
    found = [
        (
            entry.name,
            entry.use,
            f"{entry.published:,.1f}",
            f"{entry.predicted:,.1f}",
            f"{100 * entry.error:+.0f}",
        )
        for entry in errors(Assumptions())
    ]
    assert found == ROWS
