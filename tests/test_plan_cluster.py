"""GPUs, assumptions and collectives of a plan."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlef.config import ConfigError
from rlef.plan_cluster import (
    GPUS,
    Assumptions,
    bandwidth_within,
    cluster_of,
    gather_s,
    reduce_s,
    with_assumptions,
)


def test_a_gpu_is_found_however_its_name_is_written() -> None:
    cluster = cluster_of("h100", nodes=2, gpus_per_node=8, network_gbps=400)
    assert (cluster.gpu, cluster.gpus, cluster.network_bandwidth) == (GPUS["H100"], 16, 50e9)


def test_an_unknown_gpu_names_those_of_the_table() -> None:
    with pytest.raises(
        ConfigError, match="--gpu H900: no such GPU in the table; take the nearest of A100, H100"
    ):
        cluster_of("H900", nodes=1, gpus_per_node=8, network_gbps=400)


def test_an_assumption_can_be_changed_and_the_others_stay() -> None:
    changed = with_assumptions(["training_efficiency=0.3", "switch_s=1"])
    assert (changed.training_efficiency, changed.switch_s) == (0.3, 1.0)
    assert changed.decode_bandwidth == Assumptions().decode_bandwidth


@pytest.mark.parametrize(
    ("word", "message"),
    [
        (
            "trainig_efficiency=1",
            r"there is no assumption 'trainig_efficiency'; did you mean 'training_effic",
        ),
        ("nothing", r"there is no assumption 'nothing'; known: training_efficiency, "),
        ("switch_s=soon", r"--assume switch_s=soon: write it as switch_s=NUMBER"),
        ("switch_s=0", r"--assume switch_s=0: it must be a number above 0"),
        ("switch_s=nan", r"--assume switch_s=nan: it must be a number above 0"),
    ],
)
def test_an_assumption_that_cannot_be_is_refused(word: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        with_assumptions([word])


def test_every_assumption_has_its_reason() -> None:
    assert all(entry.metadata["reason"].endswith(".") for entry in fields(Assumptions))


@given(st.integers(1, 1000), st.floats(1, 1e12))
def test_an_all_reduce_is_a_reduce_scatter_and_an_all_gather(ranks: int, bytes_: float) -> None:
    assert reduce_s(bytes_, ranks, 1.0) == pytest.approx(2 * gather_s(bytes_, ranks, 1.0))


def test_a_rank_alone_communicates_nothing() -> None:
    assert reduce_s(1e9, 1, 1.0) == 0


def test_ranks_of_one_node_use_its_links_and_more_the_network() -> None:
    cluster, assumptions = cluster_of("H100", nodes=2, gpus_per_node=8, network_gbps=400), Assumptions()
    assert bandwidth_within(cluster, 8, assumptions) == 450e9 * assumptions.link_efficiency
    assert bandwidth_within(cluster, 9, assumptions) == 50e9 * assumptions.link_efficiency


def documented(heading: str) -> list[list[str]]:
    """The cells of the table whose first column has this heading, in docs/plan.md."""
    text = (Path(__file__).parents[1] / "docs" / "plan.md").read_text(encoding="utf-8")
    table = text.split(f"\n| {heading} |", 1)[1].split("\n\n", 1)[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.split("\n")[2:]]


def test_the_documentation_lists_every_assumption_with_its_value_and_its_reason() -> None:
    assert documented("assumption") == [
        [f"`{entry.name}`", f"{entry.default:g}", entry.metadata["reason"]] for entry in fields(Assumptions)
    ]


def test_the_documentation_lists_every_gpu_with_its_rates() -> None:
    assert documented("GPU") == [
        [
            gpu.name,
            f"{gpu.bf16_flops / 1e12:g}",
            f"{gpu.fp32_flops / 1e12:g}",
            f"{gpu.memory_bytes / 1e9:g}",
            f"{gpu.memory_bandwidth / 1e12:g}",
            f"{gpu.link_bandwidth / 1e9:g}",
        ]
        for gpu in GPUS.values()
    ]
