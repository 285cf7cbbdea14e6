"""A memory cgroup for each worker: what passes its limit is ended there, and nobody else suffers.

The second version of the interface is tried on plain files: no kernel that offers its memory controller has
run these tests yet. On such a machine all of them use it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from rlef_sandbox import Command, Executor, Job, Limits, SandboxFault, Test, Verdict, _core
from rlef_sandbox.memory_cgroup import NoMemoryCgroup, own_memory_cgroup
from tests.sandbox.commands import compiled
from tests.sandbox.machines import as_user
from tests.sandbox.processes import is_alive, process_tree, wait_until

MEBIBYTE = 1 << 20
TOUCH = "held = bytearray(int(input()) << 20)\nprint(len(held) >> 20)"
ECHO = "print(input())"
FEW, MANY = 1, 3  # tests of a program: each compiles it, or a solution process does so for all


def limits(mebibytes: int, *, open_files: int = 64) -> Limits:
    return Limits(
        cpu_s=5.0,
        wall_s=15.0,
        memory_bytes=mebibytes * MEBIBYTE,
        output_bytes=MEBIBYTE,
        open_files=open_files,
    )


def touching(*mebibytes: int) -> list[Test]:
    return [Test(str(size), str(size)) for size in mebibytes]


def number(folder: Path, first_version: str, second_version: str) -> int:
    name = first_version if (folder / first_version).exists() else second_version
    return int((folder / name).read_text())


def use(folder: Path) -> int:
    return number(folder, "memory.usage_in_bytes", "memory.current")


def limit(folder: Path) -> int:
    return number(folder, "memory.limit_in_bytes", "memory.max")


def peak(folder: Path) -> int:
    return number(folder, "memory.max_usage_in_bytes", "memory.peak")


def set_limit(folder: Path, mebibytes: int) -> None:
    name = "memory.limit_in_bytes" if (folder / "memory.limit_in_bytes").exists() else "memory.max"
    (folder / name).write_text(str(mebibytes * MEBIBYTE))


def below(folder: Path) -> list[Path]:
    return list(folder.glob("rlef-*"))


# ---- the limit


@pytest.mark.parametrize("tests", [FEW, MANY])
def test_program_is_ended_at_its_limit_and_the_next_one_is_unharmed(memory_cgroup, tests):
    with Executor(workers=1, memory_cgroup=str(memory_cgroup), limits=limits(64)) as single:
        [folder] = below(memory_cgroup)
        at_rest = use(folder)
        results = single.run(TOUCH, touching(500) * tests)

        assert [(r.verdict, r.stopped_by, r.signal) for r in results] == [
            (Verdict.OUT_OF_MEMORY, "memory_limit", signal.SIGKILL)
        ] * tests
        assert peak(folder) <= limit(folder) < at_rest + 100 * MEBIBYTE
        assert single.run(ECHO, [Test("1", "1")])[0].verdict is Verdict.PASSED
        assert single.restarts() == 0


def test_without_a_memory_cgroup_the_same_program_is_found_out_when_it_ends(run):
    result = run(TOUCH, "500", "500", limits=limits(64))

    assert (result.verdict, result.exit_code) == (Verdict.OUT_OF_MEMORY, 0)
    assert result.peak_memory_bytes > 500 * MEBIBYTE


COPY_THE_INTERPRETER = "import gc\nfor thing in gc.get_objects(): pass\n"  # by counting references


@pytest.mark.parametrize("tests", [FEW, MANY])
@pytest.mark.parametrize("mebibytes", [8, 64, 512])
def test_honest_program_just_below_its_limit_passes_though_the_kernel_charges_it_with_more(
    memory_cgroup, mebibytes, tests
):
    without_room = replace(limits(mebibytes), output_bytes=4096)
    with Executor(workers=1, memory_cgroup=str(memory_cgroup)) as single:
        results = single.run(
            COPY_THE_INTERPRETER + TOUCH, touching(mebibytes - 2) * tests, limits=without_room
        )

    assert {result.verdict for result in results} == {Verdict.PASSED}
    assert results[0].peak_memory_bytes > mebibytes * MEBIBYTE


def test_outputs_have_room_of_their_own(memory_cgroup):
    program = "import os\nfor stream in (1, 2):\n    os.write(stream, bytes(31 << 20))\n" + TOUCH
    roomy = Limits(memory_bytes=64 * MEBIBYTE, output_bytes=32 * MEBIBYTE)
    with Executor(workers=1, memory_cgroup=str(memory_cgroup), limits=roomy) as single:
        results = single.run(program, touching(40) * 6)

    assert {(result.verdict, result.exit_code) for result in results} == {(Verdict.WRONG_OUTPUT, 0)}


def test_memory_that_the_address_space_limit_refuses_is_still_a_memory_error(memory_cgroup):
    with Executor(workers=1, memory_cgroup=str(memory_cgroup), limits=limits(64)) as single:
        [result] = single.run("held = bytearray(10**10)", [Test("", "")])

    assert (result.verdict, result.exit_code) == (Verdict.OUT_OF_MEMORY, 1)
    assert result.stderr.endswith("MemoryError\n")


def test_each_job_has_its_own_limit_whichever_came_before(memory_cgroup):
    found = []
    with Executor(workers=1, memory_cgroup=str(memory_cgroup)) as single:
        [folder] = below(memory_cgroup)
        at_rest = use(folder)
        for mebibytes in (256, 32, 256, 64, 128):
            [result] = single.run(TOUCH, touching(100), limits=limits(mebibytes))
            found.append((result.verdict.value, result.signal))
            assert 0 < limit(folder) - at_rest - mebibytes * MEBIBYTE < 40 * MEBIBYTE

        assert single.restarts() == 0
    killed, passed = ("out_of_memory", signal.SIGKILL), ("passed", None)
    assert found == [passed, killed, passed, killed, passed]


def test_small_job_after_one_whose_compiled_program_was_large(memory_cgroup):
    large = Job(f"data = {'x' * (100 << 20)!r}\nprint(len(data))", [Test("", "")] * MANY, limits=limits(2000))
    small = Job(ECHO, [Test("1", "1")], limits=limits(1))
    with Executor(workers=1, memory_cgroup=str(memory_cgroup)) as single:
        verdicts = [results[0].verdict.value for results in single.run_many([large, small] * 2)]

        assert single.restarts() == 0
    assert verdicts == ["wrong_output", "passed"] * 2


CACHE_FILES = """
import os
read = 0
for folder, _, names in os.walk(os.path.dirname(os.__file__)):
    for name in names:
        try:
            file = os.open(os.path.join(folder, name), os.O_RDONLY)
        except OSError:
            continue
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)  # from now on in our cgroup, not in another's
        read += len(os.read(file, os.fstat(file).st_size))
        os.close(file)
    if read > 80 << 20:
        break
"""


def test_small_job_after_one_that_left_files_in_the_cache(memory_cgroup):
    large = Job(CACHE_FILES, [Test("", "")], limits=limits(1000))
    small = Job(ECHO, [Test("1", "1")], limits=limits(1))
    with Executor(workers=1, memory_cgroup=str(memory_cgroup)) as single:
        [folder] = below(memory_cgroup)
        at_rest = use(folder)
        single.run_many([large])
        cached = use(folder)
        single.run_many([small])

        assert use(folder) <= limit(folder) < at_rest + 40 * MEBIBYTE < cached
        assert single.restarts() == 0


def test_thousands_of_runs_leave_no_charge(memory_cgroup):
    jobs = [Job(ECHO, [Test("1", "1")] * count, limits=limits(64)) for count in (1, 1, 3, 5) * 50]
    with Executor(workers=1, memory_cgroup=str(memory_cgroup)) as single:
        [folder] = below(memory_cgroup)
        single.run_many(jobs)
        before = use(folder)
        for _ in range(4):
            single.run_many(jobs)

        assert use(folder) < before + 4 * MEBIBYTE  # a page for each test would be twice that


# ---- whose fault it is

FILL_PIPES = """
import os
ends = []
while True:
    try:
        reading, writing = os.pipe()
    except OSError:
        break
    ends += [reading, writing]
    os.set_blocking(writing, False)
    try:
        while True:
            os.write(writing, bytes(65536))
    except BlockingIOError:
        pass
print(len(ends))
"""


@pytest.mark.parametrize(
    ("tests", "stop", "verdicts"),
    [
        (1, False, ["out_of_memory"]),
        (5, False, ["out_of_memory"] * 5),
        (5, True, ["out_of_memory", *["skipped"] * 4]),
    ],
)
def test_memory_that_no_process_holds_is_the_programs_doing_though_the_worker_is_ended_for_it(
    memory_cgroup, tests, stop, verdicts
):
    with Executor(workers=1, memory_cgroup=str(memory_cgroup)) as single:
        results = single.run(
            FILL_PIPES, [Test("", "")] * tests, limits=limits(1, open_files=1024), stop_at_first_failure=stop
        )

        assert [result.verdict.value for result in results] == verdicts
        assert {result.stopped_by for result in results} <= {"memory_limit", None}
        assert single.run(ECHO, [Test("1", "1")])[0].verdict is Verdict.PASSED
    assert not below(memory_cgroup)


# ---- commands: the limit is that of all processes together

# A process for each size in MiB on standard input; a negative one is seconds to sleep. Fails if one of them did.
HOLD = """
#include <iostream>
#include <sys/wait.h>
#include <unistd.h>
int main(int count, char**) {
    for (long size; std::cin >> size;) {
        if (size < 0) sleep(-size);
        if (size > 0 && fork() == 0) {
            volatile char* held = new char[size << 20];
            for (long i = 0; i < size << 20; i += 4096) held[i] = 1;
            usleep(300'000);
            _exit(0);
        }
    }
    int all = 0;
    for (int status; wait(&status) > 0;) all |= status;
    return count == 1 && all != 0;
}
"""


@pytest.fixture(scope="module")
def hold() -> Command:
    with Executor(workers=1) as own:  # the shared one has no worker for commands, which some tests count on
        return Command(["./program"], files={"program": compiled(own, HOLD)}, may_fork=True)


@pytest.mark.parametrize("count", [FEW, MANY])
def test_command_is_ended_at_its_limit_and_the_next_one_is_unharmed(memory_cgroup, hold, count):
    with Executor(workers=1, memory_cgroup=str(memory_cgroup), limits=limits(64)) as single:
        results = single.run(hold, [Test("500", "")] * count)
        honest = single.run(hold, [Test("20", "")] * count)
        assert single.restarts() == 0

    assert {(r.verdict, r.stopped_by) for r in results} == {(Verdict.OUT_OF_MEMORY, "memory_limit")}
    assert {result.verdict for result in honest} == {Verdict.PASSED}


def test_processes_of_a_command_are_limited_together(memory_cgroup, hold):
    with Executor(workers=1, memory_cgroup=str(memory_cgroup), limits=limits(100)) as single:
        one, four = single.run(hold, [Test("60", ""), Test("60 60 60 60", "")])

    assert (one.verdict, four.verdict) == (Verdict.PASSED, Verdict.OUT_OF_MEMORY)


def test_process_that_was_ended_at_the_limit_is_no_verdict_for_the_next_test(memory_cgroup, hold):
    unimpressed = replace(hold, arguments=["./program", "whatever comes of it"])
    short = replace(limits(64), wall_s=1.5)
    with Executor(workers=1, memory_cgroup=str(memory_cgroup)) as single:
        results = single.run(unimpressed, [Test("500", ""), Test("-100", "")], limits=short)

    assert [result.verdict for result in results] == [Verdict.OUT_OF_MEMORY, Verdict.TIMEOUT]


def test_what_a_command_writes_has_room_of_its_own(memory_cgroup):
    files = {"in": bytes(100 * MEBIBYTE)}
    generous = replace(limits(16), file_bytes=200 * MEBIBYTE, output_bytes=MEBIBYTE)
    with Executor(workers=1, memory_cgroup=str(memory_cgroup)) as single:
        copying = Command(["/bin/sh", "-c", "cat in > out"], files=files, may_fork=True)
        result = single.run(copying, [Test("", "")], limits=generous)[0]

    assert result.verdict is Verdict.PASSED, result.stderr


def test_limit_further_up_is_a_fault_and_no_verdict(memory_cgroup):
    with Executor(workers=1, memory_cgroup=str(memory_cgroup)) as single:
        set_limit(memory_cgroup, 100)
        with pytest.raises(SandboxFault, match=r"memory that its own cgroup had left.* \(3 attempts\)"):
            single.run(TOUCH, touching(200), limits=limits(256))

        assert single.run(TOUCH, touching(200), limits=limits(40))[0].verdict is Verdict.OUT_OF_MEMORY


# ---- the folders


def test_no_folder_is_left_after_closing(memory_cgroup):
    with Executor(workers=2, memory_cgroup=str(memory_cgroup)) as pair:
        assert len(below(memory_cgroup)) == 2
        batch = pair.as_completed([Job("while True: pass", [Test("", "")] * MANY)] * 2)
    batch.cancel()

    assert not below(memory_cgroup)


def test_worker_that_was_killed_or_cancelled_leaves_no_folder(memory_cgroup):
    with Executor(workers=1, memory_cgroup=str(memory_cgroup)) as single:
        [folder] = below(memory_cgroup)
        os.kill(single.worker_pids()[0], signal.SIGKILL)
        assert single.run(ECHO, [Test("1", "1")])[0].verdict is Verdict.PASSED
        single.as_completed([Job("while True: pass", [Test("", "")] * MANY)]).cancel()
        assert single.run(ECHO, [Test("1", "1")])[0].verdict is Verdict.PASSED

        assert folder not in below(memory_cgroup)
    assert not below(memory_cgroup)


CALLER = """
from rlef_sandbox import Executor
executor = Executor(workers=1, memory_cgroup={folder!r})
print(executor.worker_pids()[0], flush=True)
input()
"""


def test_folder_of_a_caller_that_was_killed_is_removed_by_the_next_one(memory_cgroup):
    caller = subprocess.Popen(
        [sys.executable, "-c", CALLER.format(folder=str(memory_cgroup))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert caller.stdout is not None
    everybody = process_tree(int(caller.stdout.readline()))
    caller.kill()
    caller.communicate(timeout=20)
    wait_until(lambda: not any(is_alive(pid) for pid in everybody))
    [left] = below(memory_cgroup)
    of_the_living = memory_cgroup / f"rlef-{os.getppid()}-0"
    of_the_living.mkdir()

    with Executor(workers=1, memory_cgroup=str(memory_cgroup)):
        assert left not in below(memory_cgroup)
    assert below(memory_cgroup) == [of_the_living]


def test_executors_of_one_process_share_a_folder(memory_cgroup):
    with (
        Executor(workers=1, memory_cgroup=str(memory_cgroup)) as one,
        Executor(workers=1, memory_cgroup=str(memory_cgroup)) as other,
    ):
        assert len(below(memory_cgroup)) == 2
        for single in (one, other):
            assert single.run(ECHO, [Test("1", "1")])[0].verdict is Verdict.PASSED


def remove_with_processes(folder: Path, worker: int) -> None:
    for pid in process_tree(worker):
        (folder.parent.parent / "cgroup.procs").write_text(str(pid))
    wait_until(lambda: not (folder / "cgroup.procs").read_text())
    folder.rmdir()


def test_worker_whose_cgroup_vanished_is_replaced(memory_cgroup):
    with Executor(workers=1, memory_cgroup=str(memory_cgroup)) as single:
        [folder] = below(memory_cgroup)
        remove_with_processes(folder, single.worker_pids()[0])

        assert single.run(TOUCH, touching(200), limits=limits(64))[0].verdict is Verdict.OUT_OF_MEMORY
        assert single.restarts() == 1
        assert len(below(memory_cgroup)) == 1


def test_folder_that_vanished_is_a_fault_until_it_is_back(memory_cgroup):
    with Executor(workers=1, memory_cgroup=str(memory_cgroup)) as single:
        [folder] = below(memory_cgroup)
        remove_with_processes(folder, single.worker_pids()[0])
        memory_cgroup.rmdir()
        with pytest.raises(SandboxFault, match=rf"memory_cgroup: {memory_cgroup}: cannot find it"):
            single.run(ECHO, [Test("1", "1")])
        memory_cgroup.mkdir()
        if not (memory_cgroup / "memory.limit_in_bytes").exists():
            (memory_cgroup / "cgroup.subtree_control").write_text("+memory")

        wait_until(lambda: len(single.worker_pids()) == 1)
        assert single.run(ECHO, [Test("1", "1")])[0].verdict is Verdict.PASSED


# ---- folders that cannot be used


def test_folder_that_does_not_exist_is_a_fault_that_says_so(tmp_path: Path):
    with pytest.raises(SandboxFault, match=r"nowhere: cannot find it \(give .*\): No such file or directory"):
        Executor(workers=1, memory_cgroup=str(tmp_path / "nowhere"))


def test_folder_that_is_no_memory_cgroup_is_a_fault_that_says_so(tmp_path: Path):
    with pytest.raises(SandboxFault, match="cannot use it: it is no cgroup of the memory controller"):
        Executor(workers=1, memory_cgroup=str(tmp_path))


def test_folder_that_passes_no_memory_controller_on_is_a_fault_that_names_the_mend(tmp_path: Path):
    (tmp_path / "cgroup.subtree_control").write_text("cpu memory_pressure pids\n")

    with pytest.raises(SandboxFault, match=r"write \+memory to its cgroup.subtree_control first"):
        Executor(workers=1, memory_cgroup=str(tmp_path))


def test_folder_that_may_not_be_written_is_a_fault_that_says_so(memory_cgroup, open_folder):
    memory_cgroup.chmod(0o555)
    program = (
        "from rlef_sandbox import Executor, SandboxFault\n"
        f"try: Executor(workers=1, memory_cgroup={str(memory_cgroup)!r})\n"
        "except SandboxFault as fault: print(fault)"
    )

    assert as_user("nobody", program, open_folder) == (
        f"memory_cgroup: {memory_cgroup}: cannot make a cgroup in it (give a memory cgroup that this process may "
        "write, as `python -m rlef_sandbox check` finds one, or none): Permission denied\n"
    )


def test_folder_must_be_named_from_the_root_on():
    with pytest.raises(
        ValueError, match="memory_cgroup is 'memory': give a cgroup's folder, from the root on"
    ):
        Executor(workers=1, memory_cgroup="memory")


def test_run_by_hand_takes_a_memory_cgroup(memory_cgroup):
    command = [sys.executable, "-m", "rlef_sandbox", "run", "-", "--memory-cgroup", str(memory_cgroup)]
    command += ["--memory-bytes", str(64 * MEBIBYTE)]
    program = "held = bytearray(500 << 20)"

    done = subprocess.run(command, input=program, capture_output=True, text=True, timeout=60, check=False)

    assert done.stderr.startswith("out_of_memory, stopped by memory_limit, signal 9")
    assert not below(memory_cgroup)


# ---- finding one


def process_in(folder: Path, cgroups: str, mounts: list[tuple[Path, str]]) -> Path:
    """What /proc says of a process."""
    folder.mkdir(exist_ok=True)
    (folder / "cgroup").write_text(cgroups)
    (folder / "mountinfo").write_text(
        "".join(f"31 24 0:27 / {point} rw,nosuid shared:9 - {source}\n" for point, source in mounts)
    )
    return folder


def cgroup_in(folder: Path, *, passes_on: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cgroup.procs").touch()
    (folder / "cgroup.subtree_control").write_text(passes_on)
    return folder


def test_own_cgroup_of_the_first_version_is_found(tmp_path: Path):
    own = cgroup_in(tmp_path / "memory" / "a" / "b:c")
    mounts = [(tmp_path / "cpu", "cgroup none rw,cpu"), (tmp_path / "memory", "cgroup none rw,memory")]

    proc = process_in(tmp_path / "proc", "4:memory:/a/b:c\n3:cpu,cpuacct:/x\n0::/\n", mounts)

    assert own_memory_cgroup(proc) == str(own)


def test_hosts_part_of_the_path_is_passed_over_in_a_container(tmp_path: Path):
    root = cgroup_in(tmp_path / "memory")

    proc = process_in(tmp_path / "proc", "4:memory:/docker/1f\n", [(root, "cgroup none rw,memory")])

    assert own_memory_cgroup(proc) == str(root)


def test_nearest_cgroup_that_passes_memory_on_is_found_in_the_second_version(tmp_path: Path):
    cgroup_in(tmp_path / "all", passes_on="cpu memory")
    passing = cgroup_in(tmp_path / "all" / "user", passes_on="memory pids\n")
    cgroup_in(passing / "session")

    proc = process_in(tmp_path / "proc", "0::/user/session\n", [(tmp_path / "all", "cgroup2 none rw")])

    assert own_memory_cgroup(proc) == str(passing)


def test_machine_without_a_memory_controller_is_told_from_one_that_may_not_be_written(tmp_path: Path):
    proc = process_in(tmp_path / "proc", "0::/\n", [(cgroup_in(tmp_path / "all"), "cgroup2 none rw")])
    with pytest.raises(NoMemoryCgroup, match="no cgroup hierarchy that is mounted here limits memory"):
        own_memory_cgroup(proc)

    (cgroup_in(tmp_path / "all", passes_on="memory") / "cgroup.procs").unlink()
    with pytest.raises(NoMemoryCgroup, match=f"this process may not write {tmp_path}/all"):
        own_memory_cgroup(proc)


# ---- the second version, on plain files


def second_version(folder: Path, **files: str) -> Path:
    """A folder with the files that a cgroup of the second version has; `current` stands for memory.current."""
    contents = {
        "current": "5000000\n",
        "max": "max\n",
        "swap.max": "max\n",
        "events": "low 0\nhigh 0\nmax 0\noom 0\noom_kill 0\noom_group_kill 0\n",
        **files,
    }
    for name, text in contents.items():
        (folder / f"memory.{name}").write_text(text)
    (folder / "cgroup.procs").touch()
    return folder


def test_second_version_is_entered_and_limited_by_its_own_files(tmp_path: Path):
    cgroup = _core.MemoryCgroup(str(second_version(tmp_path)))
    cgroup.enter(4711)
    cgroup.note_rest()
    sizes = []
    for mebibytes in (64, 8, 64):
        cgroup.limit(limits(mebibytes))
        sizes.append(int((tmp_path / "memory.max").read_text()))

    assert (tmp_path / "cgroup.procs").read_text() == "4711"
    assert (tmp_path / "memory.swap.max").read_text() == "0"
    assert sizes[0] == sizes[2] == 5_000_000 + (64 + 16 + 4) * MEBIBYTE + 64 * MEBIBYTE // 256
    assert sizes[0] - sizes[1] == 56 * MEBIBYTE + 56 * MEBIBYTE // 256


def test_second_version_without_swap_is_used_all_the_same(tmp_path: Path):
    (second_version(tmp_path) / "memory.swap.max").unlink()

    _core.MemoryCgroup(str(tmp_path)).limit(limits(64))

    assert int((tmp_path / "memory.max").read_text()) > 64 * MEBIBYTE


def test_second_version_tells_a_kill_at_its_own_limit_from_one_for_another(tmp_path: Path):
    cgroup = _core.MemoryCgroup(str(second_version(tmp_path)))
    cgroup.limit(limits(64))
    events = tmp_path / "memory.events"
    taken = [cgroup.take_kill()]
    events.write_text("low 0\nhigh 0\nmax 7\noom 0\noom_kill 1\noom_group_kill 0\n")
    taken += [cgroup.take_kill(), cgroup.take_kill()]
    events.write_text("low 0\nhigh 0\nmax 9\noom 2\noom_kill 3\noom_group_kill 0\n")
    taken += [cgroup.take_kill(), cgroup.take_kill(), cgroup.take_kill()]

    assert taken == [None, "for_another", None, "own_limit", "own_limit", None]


def test_kills_of_the_job_before_are_not_those_of_the_next(tmp_path: Path):
    cgroup = _core.MemoryCgroup(str(second_version(tmp_path)))
    (tmp_path / "memory.events").write_text("oom 2\noom_kill 3\n")
    cgroup.limit(limits(64))

    assert cgroup.take_kill() is None


def test_second_version_is_not_limited_below_its_use_for_it_would_end_the_worker(tmp_path: Path):
    cgroup = _core.MemoryCgroup(str(second_version(tmp_path, current=str(1000 * MEBIBYTE))))

    with pytest.raises(RuntimeError, match="cannot lower its limit below its use"):
        cgroup.limit(limits(64))
    assert (tmp_path / "memory.max").read_text() == "max\n"


def test_kernel_that_does_not_count_kills_is_refused(tmp_path: Path):
    with pytest.raises(RuntimeError, match=r"cannot count what the kernel ends: Linux 4.13 is the first"):
        _core.MemoryCgroup(str(second_version(tmp_path, events="low 0\nhigh 0\nmax 0\noom 0\n")))
