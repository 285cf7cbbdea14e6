"""Run Python programs that nobody has read on standard-input tests, isolated and fast."""

from rlef_sandbox.executor import Executor
from rlef_sandbox.records import Job, Judge, Limits, Result, SandboxFault, Test, Verdict

__all__ = ["Executor", "Job", "Judge", "Limits", "Result", "SandboxFault", "Test", "Verdict"]
