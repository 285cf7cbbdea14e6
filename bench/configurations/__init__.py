"""Every kernel in every configuration that ships, for `machine_code`."""

from __future__ import annotations

from bench.configurations.estimates import of_gae, of_segments, of_value_loss, of_whitening
from bench.configurations.linear import of_linear
from bench.configurations.logprobs import of_logprobs
from bench.configurations.policy import of_policy
from bench.machine_code import Configuration


def configurations() -> list[Configuration]:
    return [
        *of_logprobs(),
        *of_policy(),
        *of_linear(),
        *of_gae(),
        *of_segments(),
        *of_value_loss(),
        *of_whitening(),
    ]
