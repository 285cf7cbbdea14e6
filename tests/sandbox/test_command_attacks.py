"""Hostile and faulty commands: each gets its verdict, and harms nothing but itself."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from rlef_sandbox import NAMESPACES, Command, Executor, Layer, Limits, Result, Test, Verdict
from tests.sandbox.commands import compiled
from tests.sandbox.machines import LIKE_DOCKER, WITHOUT, as_user
from tests.sandbox.processes import family, wait_until

ATTACKS = Path(__file__).with_name("attacks.cpp")
LIMITS = {"cpu_s": 1.0, "wall_s": 10.0, "memory_bytes": 128 << 20, "output_bytes": 1 << 20, "processes": 8}
WRITABLE = {"file_bytes": 1 << 20}

OPEN = frozenset({Layer.MOUNT_NAMESPACE})  # without it files are hidden by Landlock: EACCES, not ENOENT


@dataclass(frozen=True, kw_only=True)
class Attack:
    verdict: Verdict = Verdict.WRONG_OUTPUT  # it ends well, and no output is the expected one
    stdout: str | None = None
    limits: dict[str, float] = field(default_factory=dict)
    may_fork: bool = False
    rests_on: frozenset[Layer] = frozenset()  # without one of these it ends in another way, or cannot be run


def says(
    word: str, *, may_fork: bool = False, rests_on: frozenset[Layer] = frozenset(), **limits: float
) -> Attack:
    return Attack(stdout=word + "\n", limits=limits, may_fork=may_fork, rests_on=rests_on)


def ends(verdict: Verdict, *, may_fork: bool = False, **limits: float) -> Attack:
    return Attack(verdict=verdict, limits=limits, may_fork=may_fork)


KILLED = Attack(verdict=Verdict.SECURITY)

CATALOGUE = {
    # starting processes
    "fork": says("EAGAIN"),
    "vfork": says("EAGAIN"),
    "clone_process": says("EAGAIN"),
    "clone3": says("ENOSYS"),
    "fork_bomb": ends(Verdict.TIMEOUT, may_fork=True, wall_s=0.5),
    "daemon": Attack(stdout="", may_fork=True),
    "background": Attack(stdout="", may_fork=True),
    "new_session": says("EPERM"),
    "new_group": says("EPERM"),
    "threads": says("EAGAIN"),
    "execute_a_set_uid_program": ends(Verdict.EXCEPTION),
    # signals and other processes
    "kill_everybody": says("EPERM"),
    "kill_the_first": says("EPERM"),
    "kill_the_parent": says("EPERM"),
    "kill_the_group": says("EPERM"),
    "trace": KILLED,
    "stop_itself": ends(Verdict.TIMEOUT, wall_s=0.5),
    "abort": ends(Verdict.EXCEPTION),
    "leave_the_parent": says("EPERM"),
    "become_a_reaper": says("EPERM"),
    # rights
    "capabilities": says("none"),
    "become_root": says("EPERM"),
    "raise_cpu": says("EPERM"),
    "raise_data": says("EPERM"),
    "raise_file_size": says("EPERM"),
    "raise_processes": says("EPERM"),
    "raise_priority": says("EPERM"),
    # the kernel
    "mount": KILLED,
    "unmount": KILLED,
    "new_user_namespace": KILLED,
    "new_namespace_by_clone": ends(Verdict.SECURITY, may_fork=True),
    "change_root": KILLED,
    "io_uring": says("ENOSYS"),
    "bpf": KILLED,
    "userfaultfd": KILLED,
    "keys": KILLED,
    "performance": KILLED,
    "loosen_the_filter": says("EPERM"),
    "change_personality": KILLED,
    # the network, and sharing
    "internet": says("EAFNOSUPPORT"),
    "local_socket": says("EAFNOSUPPORT"),
    "netlink": says("EAFNOSUPPORT"),
    "vsock": says("EAFNOSUPPORT"),
    "system_v_memory": says("EPERM"),
    "shared_memory": says("EPERM"),
    "memory_file": says("EPERM"),
    # files
    "read_passwords": says("ENOENT", rests_on=OPEN),
    "read_processes": says("ENOENT", rests_on=OPEN),
    "list_the_root": says("EACCES", rests_on=frozenset({Layer.LANDLOCK})),
    "climb_out": says("ENOENT", rests_on=OPEN),
    "write_here": says("EROFS"),
    "make_a_folder": says("EPERM"),
    "change_itself": says("EROFS"),
    "remove_itself": says("EPERM"),
    "write_to_the_root": says("EROFS", rests_on=OPEN, **WRITABLE),
    "write_to_a_library": says("EROFS", rests_on=OPEN, **WRITABLE),
    "rename_out": says("EXDEV", rests_on=OPEN, **WRITABLE),
    "link_out": says("EXDEV", rests_on=OPEN, **WRITABLE),
    "make_set_uid": says("EPERM"),
    "make_a_device": says("EPERM", rests_on=OPEN, **WRITABLE),
    "write_a_device": says("EROFS"),
    "fill_the_folder": says("ENOSPC", rests_on=OPEN, **WRITABLE),
    "many_files": says("ENOSPC", rests_on=OPEN, **WRITABLE),
    "descriptors": says("0 1 2 "),
    "many_descriptors": says("EMFILE"),
    "environment": says("PATH=/usr/local/bin:/usr/bin:/bin\nHOME=/box\nTMPDIR=/box\nLANG=C.UTF-8"),
    # using up
    "burn": ends(Verdict.TIMEOUT, cpu_s=0.3),
    "burn_in_a_child": ends(Verdict.TIMEOUT, cpu_s=0.3, wall_s=1.0, may_fork=True),
    "burn_in_children_that_end": ends(Verdict.TIMEOUT, cpu_s=0.2, may_fork=True),
    "burn_and_ignore_the_signal": ends(Verdict.TIMEOUT, cpu_s=0.3),
    "idle": ends(Verdict.TIMEOUT, wall_s=0.3),
    "hold_much": ends(Verdict.OUT_OF_MEMORY),
    "hold_little": says("held"),
    "reserve_much": says("reserved"),
    "overflow_the_stack": ends(Verdict.EXCEPTION),
    "recurse_deeply": says("0"),
    "print_much": ends(Verdict.OUTPUT_LIMIT),
    "print_much_as_error": ends(Verdict.OUTPUT_LIMIT),
    "close_the_streams": Attack(stdout=""),
    "exit_250": ends(Verdict.EXCEPTION),
    "print_a_verdict": Attack(verdict=Verdict.EXCEPTION, stdout="passed\n"),
}  # fmt: skip


@pytest.fixture(scope="module")
def single() -> Iterator[Executor]:
    with Executor(workers=1) as executor:
        yield executor


@pytest.fixture(scope="module")
def executable(single: Executor) -> bytes:
    return compiled(single, ATTACKS.read_text(), "attacks")


def command(executable: bytes, name: str, *, may_fork: bool = False) -> Command:
    return Command(["./attacks", name], files={"attacks": executable}, may_fork=may_fork)


def assert_ended_as_expected(name: str, result: Result) -> None:
    attack = CATALOGUE[name]
    assert (result.verdict, "REACHED" in result.stdout) == (attack.verdict, False), (name, result)
    assert attack.stdout is None or result.stdout == attack.stdout, name


def facts_outside(executor: Executor) -> tuple[object, ...]:
    """When nothing runs any more: what an attack could have changed."""
    wait_until(lambda: not any(map(family, executor.worker_pids())))
    return (
        [str(path) for folder in ("/", "/tmp", "/usr", ".") for path in Path(folder).glob("reached*")],
        sorted(path.name for path in Path("/dev/shm").iterdir()),
        os.uname().nodename,
        executor.worker_pids(),
        executor.restarts(),
        [Path(f"/proc/{worker}/mountinfo").read_text() for worker in executor.worker_pids()],
        [Path(f"/proc/{worker}/limits").read_text() for worker in executor.worker_pids()],
    )


def test_every_attack_is_in_the_catalogue(single, executable):
    [listed] = single.run(command(executable, "?"), [Test("", "")])

    assert listed.stdout.split() == sorted(CATALOGUE)


@pytest.mark.parametrize("name", CATALOGUE)
def test_command_gets_its_verdict_and_harms_nothing_but_itself(single, executable, name):
    attack = CATALOGUE[name]
    honest = command(executable, "hold_little")
    single.run(honest, [Test("", "held")])
    before = facts_outside(single)
    limits = Limits(**{**LIMITS, **attack.limits})

    [result] = single.run(
        command(executable, name, may_fork=attack.may_fork), [Test("", "never")], limits=limits
    )

    assert_ended_as_expected(name, result)
    [after] = single.run(honest, [Test("", "held")], limits=Limits(**LIMITS))
    assert after.verdict is Verdict.PASSED, after
    wait_until(lambda: facts_outside(single) == before)


# Runs attacks from a file, an honest command behind each, and prints what became of them.
RUN_ALL = """
import dataclasses, json
from rlef_sandbox import Command, Executor, Job, Limits, Test
attacks, folder = json.load(open({attacks!r}))
files = {{"attacks": open(folder + "/attacks", "rb").read()}}
jobs = []
for name, may_fork, limits in attacks:
    hostile = Command(["./attacks", name], files=files, may_fork=may_fork)
    jobs.append(Job(hostile, [Test("", "never")], limits=Limits(**limits)))
    jobs.append(Job(Command(["./attacks", "hold_little"], files=files), [Test("", "held")]))
with Executor(workers=2, allow_missing={missing}) as executor:
    results = [result for [result] in executor.run_many(jobs)]
    assert executor.restarts() == 0
assert not [result for result in results[1::2] if result.verdict.value != "passed"]
print(json.dumps([dataclasses.asdict(result) for result in results[::2]]))
"""


def assert_catalogue_holds(
    machine: str, user: str, folder: Path, executable: bytes, missing: set[Layer]
) -> None:
    can_fork = not missing & {Layer.PID_NAMESPACE, Layer.UNPRIVILEGED_USER}
    attacks = {
        name: attack
        for name, attack in CATALOGUE.items()
        if not attack.rests_on & missing
        and (can_fork or not attack.may_fork)
        and "file_bytes" not in attack.limits
    }
    (folder / "attacks").write_bytes(executable)
    listed = [(name, attack.may_fork, {**LIMITS, **attack.limits}) for name, attack in attacks.items()]
    (folder / "attacks.json").write_text(json.dumps([listed, str(folder)]))
    program = RUN_ALL.format(attacks=str(folder / "attacks.json"), missing=[layer.value for layer in missing])

    said = as_user(user, machine + program, folder)

    for name, facts in zip(attacks, json.loads(said), strict=True):
        assert_ended_as_expected(name, Result(**{**facts, "verdict": Verdict(facts["verdict"])}))


@pytest.mark.parametrize("layer", WITHOUT, ids=lambda layer: layer.value)
def test_catalogue_holds_without_one_layer(layer, executable, open_folder):
    if layer is Layer.UNPRIVILEGED_USER and os.geteuid() != 0:
        pytest.skip("only root becomes another user")
    assert_catalogue_holds(WITHOUT[layer], "root", open_folder, executable, {layer})


@pytest.mark.parametrize("user", ["root", "nobody"])
def test_catalogue_holds_without_namespaces(user, executable, open_folder):
    assert_catalogue_holds(LIKE_DOCKER, user, open_folder, executable, set(NAMESPACES))


def test_catalogue_holds_for_an_ordinary_user(executable, open_folder):
    assert_catalogue_holds("", "nobody", open_folder, executable, set())
