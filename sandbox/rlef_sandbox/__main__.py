"""`python -m rlef_sandbox`: run a program, check what this machine gives, measure it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from rlef_sandbox import (
    Executor,
    Judge,
    Limits,
    Result,
    SandboxFault,
    Test,
    Verdict,
    check,
    check_memory_cgroup,
)

_LIMITS = {"cpu_s": float, "wall_s": float, "memory_bytes": int, "processes": int, "output_bytes": int}


def main() -> int:
    arguments = _parser().parse_args()
    command: Callable[[argparse.Namespace], int] = arguments.command
    try:
        return command(arguments)
    except (SandboxFault, ValueError, OSError) as error:
        print(f"rlef_sandbox: error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m rlef_sandbox", description="The executor by hand.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    checking = commands.add_parser("check", help="list the layers of isolation that this machine gives")
    checking.add_argument("--json", action="store_true", help="as JSON")
    checking.set_defaults(command=_check)

    running = commands.add_parser(
        "run",
        help="run a Python program as the executor does",
        description="Shows what the program printed, and on standard error the verdict. The exit status is 0 "
        "when the program passed (or, without --expected, ended well), 1 when not, and 2 when nothing could "
        "be run.",
    )
    running.add_argument("program", type=Path, metavar="FILE", help="the program; - reads standard input")
    running.add_argument("--input", type=Path, metavar="FILE", help="its standard input (default: none)")
    running.add_argument("--expected", type=Path, metavar="FILE", help="the output to compare with")
    running.add_argument("--judge", choices=["code_contests", "exact", "tokens"], default="code_contests")
    for name, kind in _LIMITS.items():
        running.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar="N", help=f"Limits.{name}")
    running.add_argument(
        "--allow-missing", action="append", default=[], metavar="LAYER", help="run without this layer"
    )
    running.add_argument("--memory-cgroup", metavar="FOLDER", help="a cgroup below which to limit its memory")
    running.add_argument("--json", action="store_true", help="the whole result as JSON on standard output")
    running.set_defaults(command=_run)
    return parser


def _check(arguments: argparse.Namespace) -> int:
    reports = check()
    cgroup = check_memory_cgroup()
    if arguments.json:
        layers = [asdict(report) for report in reports]
        print(json.dumps({"layers": layers, "memory_cgroup": asdict(cgroup)}))
        return 0
    width = max(len(report.layer.value) for report in reports)
    for report in reports:
        state = "given" if report.given else f"missing ({report.reason}): {report.loss}"
        print(f"{report.layer.value:{width}}  {state}")
    found = f"found: memory_cgroup={cgroup.folder!r} makes use of it"
    state = found if cgroup.folder else f"none ({cgroup.reason})"
    print(f"{'memory_cgroup':{width}}  {state}. Without it, {cgroup.loss}")
    return 0


def _run(arguments: argparse.Namespace) -> int:
    source = sys.stdin.read() if str(arguments.program) == "-" else _text(arguments.program)
    given = {name: getattr(arguments, name) for name in _LIMITS if getattr(arguments, name) is not None}
    stdin = _text(arguments.input) if arguments.input else ""
    expected = _text(arguments.expected) if arguments.expected else None
    judge: Judge = arguments.judge
    limits = Limits(**given)
    with Executor(
        workers=1,
        limits=limits,
        allow_missing=arguments.allow_missing,
        memory_cgroup=arguments.memory_cgroup,
    ) as executor:
        [result] = executor.run(source, [Test(stdin, expected or "")], judge=judge)
    ended_well = expected is None and result.verdict in {Verdict.PASSED, Verdict.WRONG_OUTPUT}
    verdict = "ended well" if ended_well else result.verdict.value
    if arguments.json:
        print(json.dumps(asdict(result) | {"verdict": verdict}))
    else:
        _show(result, verdict)
    return 0 if ended_well or result.verdict is Verdict.PASSED else 1


def _show(result: Result, verdict: str) -> None:
    sys.stdout.write(result.stdout)
    sys.stdout.flush()
    sys.stderr.write(result.stderr)
    facts = [verdict]
    if result.stopped_by:
        facts.append(f"stopped by {result.stopped_by}")
    facts.append(f"signal {result.signal}" if result.exit_code is None else f"exit status {result.exit_code}")
    facts += [f"{result.cpu_s:.3f} s CPU", f"{result.wall_s:.3f} s", f"{result.peak_memory_bytes >> 20} MiB"]
    print(", ".join(facts), file=sys.stderr)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
