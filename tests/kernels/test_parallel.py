"""Split over 1, 2, 4 and 8 real gloo processes, every operation gives what one process gives."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.multiprocess

SIZES = ["1", "2", "4", "8"]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    store = tmp_path_factory.mktemp("gloo") / "store"
    script = Path(__file__).with_name("ranks.py")
    process = subprocess.run(
        [sys.executable, str(script), str(store)], capture_output=True, text=True, timeout=120, check=False
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", ["plain", "offset", "far apart", "half impossible"])
def test_a_split_vocabulary_gives_the_whole_ones_logprobs(report: Any, size: str, case: str) -> None:
    assert report[size][case]["values"] <= 1e-12


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", ["plain", "offset", "far apart", "half impossible"])
def test_a_split_vocabulary_gives_each_process_its_part_of_the_gradient(
    report: Any, size: str, case: str
) -> None:
    assert report[size][case]["gradient"] <= 1e-12


@pytest.mark.parametrize("size", SIZES)
def test_a_split_vocabulary_gives_the_whole_ones_policy_loss(report: Any, size: str) -> None:
    assert report[size]["policy loss"]["values"] <= 1e-12
    assert report[size]["policy loss"]["gradient"] <= 1e-12


@pytest.mark.parametrize("size", SIZES)
def test_a_split_output_weight_gives_the_whole_ones_loss_and_gradients(report: Any, size: str) -> None:
    assert max(report[size]["linear loss"].values()) <= 1e-12


@pytest.mark.parametrize("size", SIZES)
def test_processes_exchange_sixteen_bytes_per_token_once(report: Any, size: str) -> None:
    assert report[size]["traffic"] == {"calls": ["all_gather"], "bytes_per_token": 16.0}


@pytest.mark.parametrize("size", SIZES)
def test_values_spread_over_processes_are_whitened_as_if_they_were_together(report: Any, size: str) -> None:
    assert report[size]["whitening"]["whitened"] <= 1e-6
    assert report[size]["whitening"]["mean"] <= 1e-9
    assert report[size]["whitening"]["variance"] <= 1e-9
