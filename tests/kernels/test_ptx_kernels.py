"""Every shipped kernel as it is compiled for sm_80, run in a simulator (`ptx`) on tensors of this CPU.

A kernel that ships needs an entry in `TRIALS`: the first word of its configuration's name, and a function
that makes arguments and the float64 reference.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec

import pytest

if find_spec("triton") is None and os.environ.get("CI") != "true":
    pytest.skip("triton is not installed: pip install triton", allow_module_level=True)

from bench.machine_code import Configuration
from tests.kernels.ptx import trials_gae, trials_linear, trials_logprobs, trials_policy, trials_small
from tests.kernels.ptx.deletions import needless, waits_of
from tests.kernels.ptx.program import Program
from tests.kernels.ptx.trial import CONFIGURATIONS, Trial, program_of

TRIALS: dict[str, Callable[[Configuration], list[Trial]]] = {
    "statistics": trials_logprobs.statistics,
    "gradient": trials_logprobs.gradient,
    "gae": trials_gae.gae,
    "segment": trials_small.segment,
    "value": trials_small.value,
    "whitening": trials_small.whitening,
    "linear": trials_linear.linear,
    "policy": trials_policy.policy,
}


def trials_of(name: str) -> list[Trial]:
    return TRIALS[name.split(maxsplit=1)[0]](CONFIGURATIONS[name])


def test_every_kernel_that_ships_is_tried() -> None:
    assert {name.split(maxsplit=1)[0] for name in CONFIGURATIONS} <= set(TRIALS)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_the_compiled_kernel_gives_what_the_reference_gives(name: str) -> None:
    for trial in trials_of(name):
        trial.check(program_of(name), CONFIGURATIONS[name])


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_no_barrier_and_no_wait_can_be_left_out(name: str) -> None:
    program, trials = program_of(name), trials_of(name)
    assert waits_of(program) or not program.shared_bytes, "threads exchange with no barrier at all"

    def attempt(less: Program) -> None:
        for trial in trials:
            trial.check(less, CONFIGURATIONS[name])

    assert not needless(program, attempt)
