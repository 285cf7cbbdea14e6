"""What the PTX of the policy loss from logits says of the caches."""

from __future__ import annotations

import os
import re
from importlib.util import find_spec

import pytest

if find_spec("triton") is None and os.environ.get("CI") != "true":
    pytest.skip("triton is not installed: pip install triton", allow_module_level=True)

from bench.configurations import configurations
from bench.machine_code import compiled


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_a_row_stays_in_the_cache_until_it_is_read_again(target: str) -> None:
    (configuration,) = [each for each in configurations() if each.name == "policy rows bf16"]
    binary, _ = compiled(configuration, target)
    wide = re.findall(r"ld\.global\S*L2::cache_hint\S*v4.*?(%rd\d+);", binary.asm["ptx"])
    policies = {
        register: policy
        for policy, register in re.findall(
            r"createpolicy\.fractional\.L2::(\w+)\.b64 (%rd\d+)", binary.asm["ptx"]
        )
    }
    order = [policies[register] for register in wide]
    first, second = order.count("evict_last"), order.count("evict_first")
    assert first
    assert second
    assert order == ["evict_last"] * first + ["evict_first"] * second
