"""Is this machine fit to train? Each answer is a finding; one that is not good says what to do about it.

Nothing is assumed that can be tried: processes meet in a collective, a program runs in the sandbox, a file is
written where the run would write.
"""

from __future__ import annotations

from collections.abc import Iterator

from rlef.config import Config
from rlef.doctor_machine import gpus, layout, limits, packages, processor
from rlef.doctor_network import collectives, host_name, interfaces
from rlef.doctor_sandbox import sandbox
from rlef.doctor_storage import disk, memory, shared_folder
from rlef.findings import Finding


def diagnose(config: Config) -> Iterator[Finding]:
    """Look at everything that a run with these settings would need, cheapest first."""
    yield from packages()
    yield from processor(config)
    yield from memory(config)
    yield from disk(config)
    yield from shared_folder(config)
    yield from limits()
    yield from gpus()
    yield from layout(config)
    yield from host_name(config)
    yield from interfaces()
    yield from collectives()
    yield from sandbox(config)
