"""Programs to compile."""

from __future__ import annotations

from rlef_sandbox import Command, Executor, Verdict

COMPILER = "/usr/bin/g++"


def compiled(executor: Executor, source: str, name: str = "program") -> bytes:
    """The executable, built in the sandbox."""
    build = Command(
        [COMPILER, "-std=c++17", "-O1", "-pthread", "-o", name, f"{name}.cpp"],
        files={f"{name}.cpp": source},
        outputs=[name],
    )
    result = executor.build(build)
    assert result.verdict is Verdict.PASSED, result.stderr
    return result.files[name]
