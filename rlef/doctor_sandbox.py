"""Whether programs run in isolation: the sandbox's layers, a memory cgroup, and one program that is tried."""

from __future__ import annotations

from collections.abc import Iterator

from rlef.config import Config
from rlef.execution import open_executor
from rlef.findings import Finding, Level
from rlef_sandbox import SandboxFault, Test, Verdict, check, check_memory_cgroup


def sandbox(config: Config) -> Iterator[Finding]:
    """Its layers, a memory cgroup, and one program that runs."""
    try:
        reports = check()
    except SandboxFault as error:
        yield Finding.fault(
            "sandbox",
            str(error),
            "a filter around this process may forbid what it needs: SECURITY.md says what that is",
        )
        return
    missing = [report for report in reports if not report.given]
    for report in missing:
        is_allowed = report.layer.value in config.executor.allow_missing
        allowed = ",".join([*config.executor.allow_missing, report.layer.value])
        yield Finding(
            level=Level.WARNING if is_allowed else Level.FAULT,
            subject=f"sandbox, {report.layer.value}",
            found=f"{report.reason}; without it {report.loss}",
            mend="give the machine this layer"
            + ("" if is_allowed else f", or do without it: executor.allow_missing={allowed}"),
        )
    if not missing:
        yield Finding.good("sandbox", f"all {len(reports)} layers of isolation")
    yield _memory_cgroup(config)
    if all(report.layer.value in config.executor.allow_missing for report in missing):
        yield _one_program(config)


def _memory_cgroup(config: Config) -> Finding:
    report = check_memory_cgroup()
    if config.executor.memory_cgroup:
        return Finding.good("memory cgroup", config.executor.memory_cgroup)
    if report.folder is not None:
        return Finding.warning(
            "memory cgroup",
            f"not used; without it {report.loss}",
            f"this machine has one: executor.memory_cgroup={report.folder}",
        )
    return Finding.warning(
        "memory cgroup",
        f"{report.reason}; without it {report.loss}",
        "let the machine delegate a cgroup with the memory controller to this user (see SECURITY.md)",
    )


def _one_program(config: Config) -> Finding:
    try:
        with open_executor(config.executor, workers=1) as executor:
            (result,) = executor.run("print(int(input()) * 2)", [Test(input="21\n", expected_output="42\n")])
    except (SandboxFault, ValueError) as error:
        return Finding.fault(
            "a program", str(error), "python -m rlef_sandbox check says what the sandbox has here"
        )
    if result.verdict is not Verdict.PASSED:
        return Finding.fault(
            "a program",
            f"that is right was judged {result.verdict.value}",
            "report it with the output of python -m rlef_sandbox check",
        )
    return Finding.good("a program", f"ran in the sandbox in {result.wall_s * 1e3:.0f} ms")
