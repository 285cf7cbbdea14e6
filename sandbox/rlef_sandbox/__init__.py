"""Run Python programs that nobody has read on standard-input tests, isolated and fast."""

from rlef_sandbox.batch import Batch
from rlef_sandbox.checks import LayerReport, MemoryCgroupReport, check, check_memory_cgroup
from rlef_sandbox.executor import Executor
from rlef_sandbox.judges import outputs_match
from rlef_sandbox.layers import NAMESPACES, Layer
from rlef_sandbox.records import (
    Call,
    Checker,
    Command,
    Job,
    Judge,
    Limits,
    Result,
    SandboxFault,
    StoppedBy,
    Tally,
    Test,
    Tokens,
    Verdict,
)

__all__ = [
    "NAMESPACES",
    "Batch",
    "Call",
    "Checker",
    "Command",
    "Executor",
    "Job",
    "Judge",
    "Layer",
    "LayerReport",
    "Limits",
    "MemoryCgroupReport",
    "Result",
    "SandboxFault",
    "StoppedBy",
    "Tally",
    "Test",
    "Tokens",
    "Verdict",
    "check",
    "check_memory_cgroup",
    "outputs_match",
]
