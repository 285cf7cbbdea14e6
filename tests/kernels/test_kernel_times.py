"""What bench/kernel_times.py would measure on a GPU, at small sizes on a CPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from bench.kernel_times import PUBLISHED, Case, calls_of, predicted_milliseconds

SMALL = {
    "logprobs forward": {"tokens": 8, "vocab": 50},
    "policy loss forward+backward": {"tokens": 8, "vocab": 50},
    "linear loss forward+backward": {"tokens": 8, "vocab": 50, "hidden": 16},
    "gae": {"tokens": 8, "sequences": 2},
}


@pytest.mark.parametrize("operation", sorted({case.operation for case in PUBLISHED}))
def test_ours_and_eager_torch_compute_the_same(operation: str) -> None:
    ours, eager = calls_of(Case(operation=operation, **SMALL[operation]), device="cpu")
    found: Any = ours()
    if eager is None:
        assert found.advantages.shape == (SMALL[operation]["tokens"],)
        return
    for actual, expected in zip(found, eager(), strict=True):
        torch.testing.assert_close(actual.float(), expected.float(), rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("case", PUBLISHED, ids=lambda case: case.name)
def test_a_prediction_doubles_with_the_tokens_and_shrinks_on_a_faster_gpu(case: Case) -> None:
    once = predicted_milliseconds(case, "H100")
    assert predicted_milliseconds(replace(case, tokens=2 * case.tokens), "H100") == pytest.approx(2 * once)
    assert predicted_milliseconds(case, "B200") < once
