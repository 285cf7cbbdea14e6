"""Every program of the catalogue gets its verdict, and harms nothing but itself."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from rlef_sandbox import NAMESPACES, Executor, Layer, Limits, Result, Test, Verdict
from tests.sandbox.catalogue import CATALOGUE, THEMES, Threat
from tests.sandbox.machines import LIKE_DOCKER, WITHOUT, as_user
from tests.sandbox.processes import family, wait_until
from tests.sandbox.test_idioms import IDIOMS

LIMITS = {"cpu_s": 1.0, "wall_s": 10.0, "memory_bytes": 128 << 20, "output_bytes": 1 << 20}

# Says all that an earlier program could have left behind, in the interpreter or in the kernel.
HONEST = """
import atexit, builtins, decimal, gc, json, math, os, random, re, resource, signal, sys, threading, time
def limit(number):
    try:
        return resource.getrlimit(number)
    except ValueError:
        return None
left = [threading.active_count(), atexit._ncallbacks(), len(gc.callbacks), sorted(sys.modules)]
state = {
    "builtins": sorted(vars(builtins)), "path": sys.path, "finders": len(sys.meta_path + sys.path_hooks),
    "random": random.random(), "pi": math.pi, "json": json.dumps([1, None]), "join": "-".join("ab"), "seven": 6 + 1,
    "bits": (7).bit_length(), "hash": hash("x"), "precision": decimal.getcontext().prec, "zone": time.tzname,
    "collector": [gc.isenabled(), gc.get_threshold(), gc.get_debug(), gc.get_freeze_count()],
    "handlers": [str(signal.getsignal(n)) for n in signal.valid_signals()], "timer": signal.getitimer(signal.ITIMER_REAL),
    "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])), "pending": sorted(signal.sigpending()),
    "interpreter": [sys.getrecursionlimit(), sys.getswitchinterval(), sys.get_int_max_str_digits(), hasattr(sys, "tracebacklimit")],
    "hooks": [sys.gettrace(), sys.getprofile(), sys.excepthook is sys.__excepthook__, sys.displayhook is sys.__displayhook__],
    "streams": [sys.stdin.name, sys.stdout.name, sys.stdout.encoding, sys.stdin is sys.__stdin__], "main": sorted(globals()),
    "place": [os.getcwd(), sorted(os.environ.items()), os.umask(0)], "limits": [limit(n) for n in range(16)],
    "priority": os.getpriority(os.PRIO_PROCESS, 0), "user": [os.getresuid(), os.getresgid()], "cores": sorted(os.sched_getaffinity(0)),
    "pattern": re.sub("b+", "B", "abbc"), "left": left,
}
print(input(), json.dumps(state, default=str))
"""


@dataclass(frozen=True)
class Outside:
    """What a program that got out could have changed."""

    reached: list[str]  # files by the name that the programs use
    library: tuple[int, int, int]
    shared_memory: list[str]
    system_v: list[str]
    host_name: str
    workers: list[int]
    restarts: int
    worker_limits: str
    worker_log: bytes


def look_outside(executor: Executor) -> Outside:
    [worker] = executor.worker_pids()
    library = Path(os.__file__).stat()
    return Outside(
        reached=[str(path) for folder in ("/", "/tmp", ".") for path in Path(folder).glob("reached*")],
        library=(library.st_size, library.st_mode, library.st_mtime_ns),
        shared_memory=sorted(path.name for path in Path("/dev/shm").iterdir()),
        system_v=[Path(f"/proc/sysvipc/{kind}").read_text() for kind in ("shm", "msg", "sem")],
        host_name=os.uname().nodename,
        workers=executor.worker_pids(),
        restarts=executor._supervisor.restarts(),
        worker_limits=Path(f"/proc/{worker}/limits").read_text(),
        worker_log=Path(f"/proc/{worker}/fd/2").read_bytes(),
    )


# Of a worker at rest: three streams, the supervisor, and what ends pid 1 of its namespace with it.
OWN_DESCRIPTORS = ["/dev/null", "/dev/null", "/memfd", "pipe", "socket"]


def open_descriptors(pid: int) -> list[str]:
    try:
        return sorted(str(path.readlink()).partition(":")[0] for path in Path(f"/proc/{pid}/fd").iterdir())
    except FileNotFoundError:
        return ["one that was closed meanwhile"]


@pytest.fixture(scope="module")
def single() -> Iterator[Executor]:
    with Executor(workers=1) as executor:
        yield executor


@pytest.fixture(scope="module")
def honest_output(single: Executor) -> str:
    """What the honest program prints before anybody has attacked."""
    return run(single, HONEST, "well", "").stdout


def run(executor: Executor, program: str, stdin: str, expected: str, **limits: float) -> Result:
    [result] = executor.run(
        program, [Test(stdin, expected)], limits=Limits(**{**LIMITS, **limits}), judge="exact"
    )
    return result


def assert_ended_as_expected(threat: Threat, result: Result) -> None:
    assert result.verdict is threat.verdict, result.stderr
    assert "REACHED" not in result.stdout
    assert threat.stdout is None or result.stdout == threat.stdout
    lines = result.stderr.strip().splitlines() or [""]
    assert threat.error in lines[-1]
    assert threat.error or not any(line.startswith("Traceback") for line in lines), result.stderr


@pytest.mark.parametrize("name", CATALOGUE)
def test_program_gets_its_verdict_and_harms_nothing_but_itself(single, honest_output, name):
    threat = CATALOGUE[name]
    before = look_outside(single)
    [worker] = before.workers

    assert_ended_as_expected(threat, run(single, threat.program, "private\n", "never", **threat.limits))

    after = run(single, HONEST, "well", honest_output)
    assert (after.verdict, after.stdout) == (Verdict.PASSED, honest_output), after.stderr
    wait_until(lambda: not family(worker))
    wait_until(lambda: open_descriptors(worker) == OWN_DESCRIPTORS)
    assert look_outside(single) == before


def test_catalogue_is_as_large_as_it_should_be():
    programs = {threat.program for threat in CATALOGUE.values()}

    assert len(CATALOGUE) == sum(len(threats) for threats in THEMES.values())  # no name hides another
    assert len(programs) == len(CATALOGUE)
    assert len(programs) >= 150


# Runs the programs of a file, an honest one behind each that is hostile, and prints what became of them. Above,
# each test compiles its program; here there are so many that a solution process does.
RUN_ALL = """
import dataclasses, json
from rlef_sandbox import Executor, Job, Limits, Test
hostile, honest = json.load(open({programs!r}))
tests, jobs = [Test("private\\n", "never")] * 3, []
for index, (program, limits) in enumerate(hostile):
    jobs.append(Job(program, tests, limits=Limits(**limits), judge="exact", stop_at_first_failure=True))
    jobs.append(Job(honest[index % len(honest)], [Test("3\\n4\\n", "7\\n")]))
with Executor(workers=2, allow_missing={missing}) as executor:
    workers = executor.worker_pids()
    results = [result for [result, *_] in executor.run_many(jobs)]
    assert executor.worker_pids() == workers
failed = [(job.program, result) for job, result in zip(jobs[1::2], results[1::2]) if result.verdict.value != "passed"]
assert not failed, failed
print(json.dumps([dataclasses.asdict(result) for result in results[::2]]))
"""

SLOW = {Verdict.TIMEOUT, Verdict.OUT_OF_MEMORY}


def assert_catalogue_holds(
    machine: str, user: str, folder: Path, missing: set[Layer], but: set[Verdict]
) -> None:
    threats = [
        threat for threat in CATALOGUE.values() if not threat.rests_on & missing and threat.verdict not in but
    ]
    hostile = [(threat.program, {**LIMITS, **threat.limits}) for threat in threats]
    programs = folder / "programs.json"
    programs.write_text(json.dumps([hostile, list(IDIOMS.values())]))
    named = [layer.value for layer in missing]

    said = as_user(user, machine + RUN_ALL.format(programs=str(programs), missing=named), folder)

    for threat, facts in zip(threats, json.loads(said), strict=True):
        assert_ended_as_expected(threat, Result(**{**facts, "verdict": Verdict(facts["verdict"])}))


@pytest.mark.parametrize("layer", WITHOUT, ids=lambda layer: layer.value)
def test_catalogue_holds_without_one_layer(layer, open_folder):
    if layer is Layer.UNPRIVILEGED_USER and os.geteuid() != 0:
        pytest.skip("only root becomes another user")
    assert_catalogue_holds(WITHOUT[layer], "root", open_folder, {layer}, SLOW)


@pytest.mark.parametrize("user", ["root", "nobody"])
def test_catalogue_holds_without_namespaces(user, open_folder):
    assert_catalogue_holds(LIKE_DOCKER, user, open_folder, set(NAMESPACES), SLOW if user == "root" else set())


@pytest.mark.parametrize("user", ["root", "nobody"])
def test_catalogue_holds_with_every_layer(user, open_folder):
    assert_catalogue_holds("", user, open_folder, set(), SLOW if user == "nobody" else set())
