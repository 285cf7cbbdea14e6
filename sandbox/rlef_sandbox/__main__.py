"""`python -m rlef_sandbox`: run a program, check what this machine gives, measure it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from rlef_sandbox import (
    Command,
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
from rlef_sandbox.measure import Baseline, Measurement, Row, measure

_LIMITS = {
    "cpu_s": float,
    "wall_s": float,
    "memory_bytes": int,
    "processes": int,
    "output_bytes": int,
    "file_bytes": int,
}


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
        "run", help="run a Python program as the executor does", description=_WHAT_IS_SHOWN
    )
    running.add_argument("program", type=Path, metavar="FILE", help="the program; - reads standard input")
    _add_options_of_a_run(running)
    running.set_defaults(command=_run)

    executing = commands.add_parser(
        "exec",
        help="run any command as the executor does",
        usage="python -m rlef_sandbox exec [option ...] -- EXECUTABLE [ARGUMENT ...]",
        description=_WHAT_IS_SHOWN,
    )
    executing.add_argument("arguments", nargs="+", metavar="EXECUTABLE", help="and its arguments, after --")
    executing.add_argument(
        "--file", action="append", default=[], type=Path, metavar="FILE", help="to be in its working folder"
    )
    executing.add_argument("--may-fork", action="store_true", help="let it start processes")
    executing.add_argument(
        "--readable", action="append", default=[], metavar="PATH", help="what it may read of the machine, too"
    )
    _add_options_of_a_run(executing)
    executing.set_defaults(command=_execute)

    measuring = commands.add_parser(
        "bench",
        help="measure what a test costs on this machine",
        description="Runs small programs through the executor, and in two ways that need nothing installed: "
        "a bare interpreter for each test, and the floor, a fork of a warm interpreter that exits at once. "
        "Costs are medians of alternating rounds.",
    )
    measuring.add_argument(
        "--seconds", type=float, default=10.0, metavar="N", help="for about so long (default: 10)"
    )
    measuring.add_argument(
        "--workers", type=int, default=1, metavar="N", help="Executor.workers (default: 1)"
    )
    _add_allow_missing(measuring)
    measuring.add_argument("--json", action="store_true", help="as JSON")
    measuring.set_defaults(command=_bench)
    return parser


_WHAT_IS_SHOWN = (
    "Shows what the program printed, and on standard error the verdict. The exit status is 0 when it passed "
    "(or, without --expected, ended well), 1 when not, and 2 when nothing could be run."
)


def _add_options_of_a_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--input", type=Path, metavar="FILE", help="its standard input (default: none)")
    parser.add_argument("--expected", type=Path, metavar="FILE", help="the output to compare with")
    parser.add_argument("--judge", choices=["code_contests", "exact", "tokens"], default="code_contests")
    for name, kind in _LIMITS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar="N", help=f"Limits.{name}")
    _add_allow_missing(parser)
    parser.add_argument("--memory-cgroup", metavar="FOLDER", help="a cgroup below which to limit its memory")
    parser.add_argument("--json", action="store_true", help="the whole result as JSON on standard output")


def _add_allow_missing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--allow-missing", action="append", default=[], metavar="LAYER", help="run without this layer"
    )


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
    return _run_once(arguments, source)


def _execute(arguments: argparse.Namespace) -> int:
    files = {file.name: file.read_bytes() for file in arguments.file}
    command = Command(arguments.arguments, files=files, may_fork=arguments.may_fork)
    return _run_once(arguments, command, readable=arguments.readable)


def _run_once(arguments: argparse.Namespace, program: str | Command, *, readable: Sequence[str] = ()) -> int:
    given = {name: getattr(arguments, name) for name in _LIMITS if getattr(arguments, name) is not None}
    stdin = arguments.input.read_bytes() if arguments.input else b""
    expected = _text(arguments.expected) if arguments.expected else ""
    judge: Judge = arguments.judge if arguments.expected else "any"
    with Executor(
        workers=1,
        limits=Limits(**given),
        allow_missing=arguments.allow_missing,
        readable=readable,
        memory_cgroup=arguments.memory_cgroup,
    ) as executor:
        [result] = executor.run(program, [Test(stdin, expected)], judge=judge)
    passed = result.verdict is Verdict.PASSED
    verdict = "ended well" if passed and not arguments.expected else result.verdict.value
    if arguments.json:
        print(json.dumps(asdict(result) | {"verdict": verdict}))
    else:
        _show(result, verdict)
    return 0 if passed else 1


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


def _bench(arguments: argparse.Namespace) -> int:
    found = measure(
        seconds=arguments.seconds, workers=arguments.workers, allow_missing=arguments.allow_missing
    )
    if arguments.json:
        print(json.dumps({"bench": "rlef_sandbox", **asdict(found)}))
    else:
        _show_measurement(found)
    return 0


def _show_measurement(found: Measurement) -> None:
    machine = found.machine
    print(f"{machine.cpu}, {machine.cores} cores, load {machine.load:.1f}; Linux {machine.kernel}", end="; ")
    print(f"Python {machine.python}; workers: {found.workers}")
    print(f"layers missing: {', '.join(machine.layers_missing) or 'none'}\n")
    print(f"{'a test':52} {'CPU':>8} {'wall':>8}")
    for row in found.rows:
        name = f"rlef_sandbox, tests per program: {row.tests_per_program}"
        print(f"{name:52} {_milliseconds(row)}   {row.tests_per_s_per_core:.0f} tests/s per core")
    for baseline in found.baselines:
        ratio = baseline.cpu_s / found.rows[0].cpu_s
        print(f"{baseline.name:52} {_milliseconds(baseline)}   {ratio:.2f} times the CPU time of the first")
    latency = found.latency_s
    print(f"\ncall to result {1e3 * latency.p50:.1f} ms, p99 {1e3 * latency.p99:.1f} ms", end="; ")
    print(f"a worker at rest holds {found.worker_memory_bytes / (1 << 20):.1f} MiB")


def _milliseconds(cost: Row | Baseline) -> str:
    return f"{1e3 * cost.cpu_s:5.2f} ms {1e3 * cost.wall_s:5.2f} ms"


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
