"""Every promise of SECURITY.md, attacked. What is printed after "REACHED" would be a hole."""

from __future__ import annotations

import os
from pathlib import Path
from threading import Thread

import pytest

from rlef_sandbox import Executor, Job, Limits, Result, Test, Verdict
from tests.sandbox.processes import descendants, family, memory_of, wait_until

CALL = "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"

# Attacks that the kernel answers by killing the program.
KILLED = {
    "tcp_socket": "import socket\nsocket.socket()",
    "udp_socket": "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM)",
    "ipv6_socket": "import socket\nsocket.socket(socket.AF_INET6)",
    "netlink_socket": "import socket\nsocket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
    "vsock_socket": "import socket\nsocket.socket(40)",
    "packet_socket": "import socket\nsocket.socket(socket.AF_PACKET, socket.SOCK_RAW)",
    "name_lookup": "import socket\nsocket.getaddrinfo('localhost', 80)",
    "exec": "import os\nos.execv('/bin/sh', ['sh', '-c', 'echo REACHED'])",
    "exec_of_a_descriptor": CALL + "libc.fexecve(0, None, None)\nlibc.execveat(0, b'', None, None, 0x1000)",
    "ptrace_the_parent": CALL + "import os\nlibc.ptrace(16, os.getppid(), 0, 0)",
    "ptrace_me": CALL + "libc.ptrace(0, 0, 0, 0)",
    "read_the_parents_memory": CALL + "libc.process_vm_readv(1, None, 0, None, 0, 0)",
    "write_the_parents_memory": CALL + "libc.process_vm_writev(1, None, 0, None, 0, 0)",
    "take_a_descriptor_of_the_parent": CALL + "libc.syscall(438, 0, 3, 0)",
    "mount": CALL + "libc.mount(b'none', b'/', b'tmpfs', 0, None)",
    "unmount": CALL + "libc.umount2(b'/', 2)",
    "unshare_user_namespace": CALL + "libc.unshare(0x10000000)",
    "clone_into_a_user_namespace": CALL + "libc.syscall(56, 0x10000000 | 17, 0, 0, 0, 0)",
    "join_a_namespace": CALL + "libc.setns(0, 0)",
    "chroot": "import os\nos.chroot('/')",
    "pivot_root": CALL + "libc.syscall(155, b'.', b'.')",
    "bpf": CALL + "libc.syscall(321, 0, 0, 0)",
    "perf_event_open": CALL + "libc.syscall(298, 0, 0, -1, -1, 0)",
    "io_uring": CALL + "libc.syscall(425, 1, 0)",
    "userfaultfd": CALL + "libc.syscall(323, 0)",
    "keyring": CALL + "libc.syscall(250, 0, 0, 0)",
    "load_a_module": CALL + "libc.syscall(175, 0, 0, b'')",
    "kernel_log": CALL + "libc.klogctl(3, None, 0)",
    "set_the_clock": CALL + "libc.syscall(164, 0, 0)",
    "set_the_host_name": "import socket\nsocket.sethostname('x')",
    "reboot": CALL + "libc.reboot(0)",
    "disable_address_randomisation": CALL + "libc.personality(0x40000)",
    "open_by_handle": CALL + "libc.open_by_handle_at(0, None, 0)",
    "x32_system_call": CALL + "libc.syscall(0x40000000 | 39)",
    "machine_code_for_i386": (
        CALL + "import mmap\n"
        "code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)\n"
        "code.write(b'\\xb8\\x14\\x00\\x00\\x00\\xcd\\x80\\xc3')\n"  # mov eax, getpid; int 0x80; ret
        "address = ctypes.addressof(ctypes.c_char.from_buffer(code))\n"
        "print('REACHED', ctypes.CFUNCTYPE(ctypes.c_int)(address)())"
    ),
}

# Attacks that the kernel refuses; a program that does not catch the error ends with it.
REFUSED = {
    "fork": "import os\nos.fork()",
    "fork_by_system_call": CALL + "assert libc.syscall(57) >= 0",
    "vfork_by_system_call": CALL + "assert libc.syscall(56, 0x4000 | 0x100 | 17, 0, 0, 0, 0) >= 0",
    "subprocess": "import subprocess\nsubprocess.run(['/bin/sh', '-c', 'echo REACHED'])",
    "multiprocessing": "import multiprocessing\nmultiprocessing.Process(target=print, args=['REACHED']).start()",
    "kill_the_parent": "import os\nos.kill(os.getppid(), 9)",
    "kill_everybody": "import os\nos.kill(-1, 9)",
    "kill_the_group": "import os\nos.killpg(0, 9)",
    "kill_pid_1": "import os\nos.kill(1, 9)",
    "kill_by_descriptor": "import os, signal\nsignal.pidfd_send_signal(os.pidfd_open(1), 9)",
    "signal_of_a_descriptors_owner": "import fcntl\nfcntl.fcntl(0, fcntl.F_SETOWN, 1)",
    "leave_the_session": "import os\nos.setsid()",
    "survive_the_parent": CALL + "assert libc.prctl(1, 0, 0, 0, 0) == 0",
    "become_root": "import os\nos.setresuid(0, 0, 0)",
    "gain_capabilities": CALL
    + "assert libc.syscall(126, ctypes.create_string_buffer(8), ctypes.create_string_buffer(24)) == 0",
    "install_a_filter": CALL + "assert libc.syscall(317, 0, 0, 0) == 0",
    "limit_another_process": "import resource\nresource.prlimit(1, resource.RLIMIT_CPU, (1, 1))",
    "raise_the_memory_limit": "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    "raise_the_output_limit": "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))",
    "raise_the_file_limit": "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (9999, 9999))",
    "higher_priority": "import os\nos.nice(-5)",
    "real_time": "import os\nos.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))",
    "other_cores": "import os\nos.sched_setaffinity(0, {0})",
    "unix_socket": "import socket\nsocket.socket(socket.AF_UNIX)",
    "pass_descriptors": "import socket\na, b = socket.socketpair()\nsocket.send_fds(a, [b'x'], [0])",
    "shared_memory": CALL + "assert libc.shmget(0, 4096, 0o1600) >= 0",
    "message_queue": CALL + "assert libc.msgget(0, 0o1600) >= 0",
    "memory_file": "import os\nos.memfd_create('x')",
    "lock_memory": CALL + "assert libc.mlockall(3) == 0",
    "type_into_the_terminal": "import fcntl, termios\nfcntl.ioctl(0, termios.TIOCSTI, b'x')",
    "write_a_file": "open('/tmp/reached', 'w')",
    "write_in_the_working_folder": "open('reached', 'w')",
    "append_to_the_library": "import os\nopen(os.__file__, 'a')",
    "make_a_folder": "import os\nos.mkdir('/tmp/reached')",
    "make_a_named_pipe": "import os\nos.mkfifo('/reached')",
    "make_a_link": "import os\nos.symlink('/etc', '/reached')",
    "remove_a_file": "import os\nos.remove(os.__file__)",
    "rename_a_file": "import os\nos.rename(os.__file__, '/x')",
    "change_a_mode": "import os\nos.chmod(os.__file__, 0o777)",
    "change_a_time": "import os\nos.utime(os.__file__)",
    "temporary_file": "import tempfile\ntempfile.TemporaryFile()",
    "change_the_input": "import os\nos.ftruncate(0, 0)",
    "write_the_input": "import os\nos.pwrite(0, b'x', 0)",
    "map_the_input_for_writing": "import mmap\nmmap.mmap(0, 0)[0] = 1",
    "read_passwords": "print('REACHED', open('/etc/passwd').read())",
    "read_processes": "import os\nprint('REACHED', os.listdir('/proc'))",
    "read_own_memory_file": "print('REACHED', open('/proc/self/mem', 'rb'))",
    "read_own_environment_file": "print('REACHED', open('/proc/self/environ').read())",
    "read_devices": "print('REACHED', open('/dev/kmsg').read())",
    "list_the_home_folder": "import os\nprint('REACHED', os.listdir('/home'))",
    "list_temporary_files": "import os\nprint('REACHED', os.listdir('/tmp'))",
    "import_installed_packages": "import pip",
    "walk_up": "print('REACHED', open('../../../../../../etc/hostname').read())",
}


def attack(executor: Executor, program: str, **limits: float) -> Result:
    """Runs the attack on input `private`; afterwards the same worker must still be well."""
    limit = Limits(
        **{"cpu_s": 1.0, "wall_s": 3.0, "memory_bytes": 128 << 20, "output_bytes": 1 << 20, **limits}
    )
    result = executor.run(program, [Test("private\n", "never")], limits=limit)[0]
    [after] = executor.run("print(input())", [Test("well", "well")])
    assert after.verdict is Verdict.PASSED
    assert "REACHED" not in result.stdout
    return result


@pytest.mark.parametrize("name", KILLED)
def test_hostile_call_is_killed(executor, name):
    assert attack(executor, KILLED[name]).verdict is Verdict.SECURITY


@pytest.mark.parametrize("name", REFUSED)
def test_forbidden_call_is_refused(executor, name):
    result = attack(executor, REFUSED[name])

    assert (result.verdict, result.exit_code) == (Verdict.EXCEPTION, 1), result.stderr


def test_fork_bomb_makes_no_process(executor):
    program = "import os\nmade = 0\nfor _ in range(1000):\n    try:\n        made += os.fork() >= 0\n    except OSError:\n        pass\nprint(made)"

    assert attack(executor, program).stdout == "0\n"


def test_thread_bomb_is_bounded(executor):
    program = (
        "import threading, time\nthreading.stack_size(65536)\nmade = 0\ntry:\n    while made < 1000:\n"
        "        threading.Thread(target=time.sleep, args=[0.2], daemon=True).start()\n        made += 1\n"
        "except RuntimeError:\n    print(made, flush=True)\nimport os\nos._exit(0)"
    )

    assert attack(executor, program, processes=16).stdout == "15\n"


def test_memory_bomb_ends(executor):
    assert attack(executor, "x = b'1'\nwhile True: x += x").verdict is Verdict.OUT_OF_MEMORY


def test_memory_bomb_of_small_objects_ends(executor):
    result = attack(executor, "x = []\nwhile True: x.append(b'x' * len(x))", cpu_s=20.0, wall_s=40.0)

    assert result.verdict is Verdict.OUT_OF_MEMORY


def test_anonymous_maps_count_as_memory(executor):
    program = "import mmap\nkept = []\nwhile True:\n    kept.append(mmap.mmap(-1, 16 << 20))\n    kept[-1].write(b'x' * (16 << 20))"

    assert attack(executor, program, cpu_s=20.0, wall_s=40.0).verdict in {
        Verdict.OUT_OF_MEMORY,
        Verdict.EXCEPTION,
    }


def test_output_bomb_ends_though_the_signal_is_ignored(executor):
    program = "import signal, sys\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nwhile True: sys.stdout.write('x' * 4096)"

    result = attack(executor, program)

    assert result.verdict in {Verdict.OUTPUT_LIMIT, Verdict.EXCEPTION}
    assert result.verdict is not Verdict.PASSED


def test_sparse_output_is_bounded(executor):
    program = "import os\nos.ftruncate(1, 1 << 40)"

    assert attack(executor, program).verdict is Verdict.OUTPUT_LIMIT


def test_busy_loop_that_ignores_every_signal_ends(executor):
    program = (
        "import signal\nfor number in range(1, 65):\n    try:\n        signal.signal(number, signal.SIG_IGN)\n"
        "    except (OSError, ValueError):\n        pass\nwhile True: pass"
    )

    assert attack(executor, program, cpu_s=0.2).verdict is Verdict.TIMEOUT


def test_busy_threads_cannot_share_out_the_cpu_time(executor):
    program = (
        "import hashlib, threading\ndef burn():\n    while True: hashlib.sha256(bytes(1 << 20))\n"
        "for _ in range(4): threading.Thread(target=burn).start()"
    )

    assert attack(executor, program, cpu_s=0.3).verdict is Verdict.TIMEOUT


def test_stopping_oneself_ends_with_the_wall_clock(executor):
    program = "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)"

    assert attack(executor, program, wall_s=0.3).verdict is Verdict.TIMEOUT


def test_closing_the_standard_streams_hurts_nobody_else(executor):
    assert (
        attack(executor, "import os\nos.close(0); os.close(1); os.close(2)").verdict is Verdict.WRONG_OUTPUT
    )


def test_leaving_with_status_zero_does_not_pass(executor):
    assert attack(executor, "import os\nos._exit(0)").verdict is Verdict.WRONG_OUTPUT


def test_no_descriptor_is_open_but_the_three_streams(executor):
    program = "import fcntl\nfor fd in range(256):\n    try:\n        fcntl.fcntl(fd, fcntl.F_GETFD); print(fd, end=' ')\n    except OSError: pass"

    assert attack(executor, program).stdout == "0 1 2 "


def test_environment_holds_nothing_of_the_caller(executor, monkeypatch):
    monkeypatch.setenv("RLEF_SECRET", "REACHED")
    with Executor(workers=1) as own:
        result = attack(own, "import os\nprint(sorted(os.environ), os.getcwd())")

    assert result.stdout == "['LC_CTYPE', 'LD_BIND_NOW', 'PYTHONHASHSEED'] /\n"


def test_nobody_is_root(executor):
    program = "import os\nprint(0 in os.getresuid() + os.getresgid(), os.getgroups())"

    assert attack(executor, program).stdout == "False []\n"


def test_no_other_process_is_visible(executor):
    program = (
        "import os\nseen = []\nfor pid in range(1, 5000):\n    try:\n        os.getpgid(pid); seen.append(pid)\n"
        "    except OSError: pass\nprint(seen[0], len(seen), seen[-1] == os.getpid())"
    )

    assert attack(executor, program).stdout == "1 2 True\n"  # the first of the namespace, and itself
    with_solution_process = executor.run(program, [Test("", "")] * 3)
    assert {result.stdout for result in with_solution_process} == {"1 3 True\n"}


def test_expected_output_is_in_no_memory_that_the_program_can_read(executor):
    needle = "expected-" + "needle"
    program = (
        "import gc, sys\nfound = []\nneedle = 'expected-' + 'needle'\n"
        "for thing in gc.get_objects():\n    if isinstance(thing, dict):\n"
        "        found += [1 for value in thing.values() if isinstance(value, (str, bytes)) and needle in str(value) "
        "and value is not needle]\n"
        "frame = sys._getframe()\nwhile frame:\n"
        "    found += [1 for name, value in frame.f_locals.items() if name != 'needle' and value == needle]\n"
        "    frame = frame.f_back\nprint('REACHED' if found else 'nothing')"
    )

    result = executor.run(program, [Test("", needle)])[0]

    assert result.stdout == "nothing\n"


@pytest.mark.parametrize("tests", [1, 3])  # without a solution process, and with one
def test_expected_output_never_enters_a_worker_process(executor, tests):
    secret = "seldom" + "-seen-" + str(os.getpid())
    thread = Thread(target=executor.run, args=("import time; time.sleep(1)", [Test("", secret)] * tests))
    thread.start()
    [worker] = executor.worker_pids()
    wait_until(lambda: len(descendants(worker)) == (1 if tests == 1 else 2))
    images = [memory_of(pid) for pid in family(worker)]
    thread.join()

    assert sum(b"time.sleep(1)" in image for image in images) == (1 if tests == 1 else 2)
    assert not any(secret.encode() in image for image in images)


@pytest.mark.parametrize("tests", [2, 3])  # without a solution process, and with one
def test_a_test_finds_nothing_of_the_test_before(executor, tests):
    program = (
        "import builtins, sys, atexit\nprint(getattr(builtins, 'left', None), 'left' in globals(), 'left' in sys.modules)\n"
        "builtins.left = left = input()\nsys.modules['left'] = sys\nprint = builtins.print = None\n"
        "atexit.register(sys.stdout.write, '')"
    )

    results = executor.run(program, [Test(str(i), "none false false") for i in range(tests)])

    assert [result.verdict for result in results] == [Verdict.PASSED] * tests


def test_a_program_finds_nothing_of_the_program_before(executor):
    executor.run(
        "import math, sys\nmath.pi = 3\nsys.path.append('x')\nsys.setrecursionlimit(50)", [Test("", "")]
    )

    result = executor.run(
        "import math, sys\nprint(math.pi, 'x' in sys.path, sys.getrecursionlimit())", [Test("", "")]
    )[0]

    assert result.stdout == "3.141592653589793 False 1000\n"


def test_next_input_is_not_readable_while_a_test_runs(executor):
    program = "import gc\nprint('tupni-dnoces'[::-1] in str(gc.get_objects()))"

    [first, _] = executor.run(program, [Test("", "False"), Test("second-input", "")])

    assert first.stdout == "False\n"


def test_nothing_outside_is_changed(executor, tmp_path: Path):
    target = tmp_path / "kept"
    target.write_text("kept")
    target.chmod(0o666)
    tmp_path.chmod(0o777)
    programs = [
        f"open({str(target)!r}, 'w').write('changed')",
        f"import os; os.remove({str(target)!r})",
        f"open({str(tmp_path / 'new')!r}, 'w')",
        f"print('REACHED', open({str(target)!r}).read())",
    ]

    results = executor.run_many([Job(program, [Test("", "")]) for program in programs])

    assert [result.verdict for [result] in results] == [Verdict.EXCEPTION] * 4
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert target.read_text() == "kept"
