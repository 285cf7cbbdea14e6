"""The system call filters, instruction by instruction, in an evaluator of our own."""

from __future__ import annotations

import platform
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlef_sandbox import _core

X86_64, I386, AARCH64 = 0xC000003E, 0x40000003, 0xC00000B7
ALLOW, KILL, REFUSE = 0x7FFF0000, 0x80000000, 0x00050000
EPERM, EAGAIN, EROFS, ENOSYS = 1, 11, 30, 38
OWN_PID = 4711

NUMBERS = {
    "read": 0, "open": 2, "mmap": 9, "socket": 41, "clone": 56, "fork": 57, "execve": 59, "kill": 62, "ptrace": 101,
    "sendto": 44, "recvfrom": 45, "prctl": 157, "tgkill": 234, "openat": 257, "prlimit64": 302, "clone3": 435,
}  # fmt: skip

assert platform.machine() == "x86_64", "the numbers above are those of x86-64"


def evaluate(program, number: int, arguments: tuple[int, ...] = (), architecture: int = X86_64) -> int:
    padded = [*arguments, 0, 0, 0, 0, 0, 0][:6]
    data = struct.pack("<IIQ6Q", number, architecture, 0, *(value % 2**64 for value in padded))
    accumulator, at = 0, 0
    while True:
        code, if_true, if_false, k = program[at]
        at += 1
        if code == 0x20:  # load a word
            [accumulator] = struct.unpack_from("<I", data, k)
        elif code == 0x54:  # and
            accumulator &= k
        elif code == 0x05:  # jump
            at += k
        elif code in (0x15, 0x35, 0x45):  # equal, at least, any bit
            holds = {0x15: accumulator == k, 0x35: accumulator >= k, 0x45: accumulator & k}[code]
            at += if_true if holds else if_false
        else:
            assert code == 0x06, f"the filter holds an instruction {code:#x} that nobody planned"
            return k


def worker(name: str, *arguments: int) -> int:
    return evaluate(_core.worker_filter(), NUMBERS[name], arguments)


def in_a_test(name: str, *arguments: int) -> int:
    return evaluate(_core.test_filter(OWN_PID), NUMBERS[name], arguments)


@pytest.mark.parametrize("architecture", [I386, AARCH64, 0])
@given(number=st.integers(0, 2**32 - 1))
def test_other_architectures_are_killed(architecture, number):
    assert evaluate(_core.worker_filter(), number, architecture=architecture) == KILL


@given(number=st.integers(0x40000000, 2**32 - 1))
def test_x32_is_killed(number):
    assert evaluate(_core.worker_filter(), number) == KILL
    assert evaluate(_core.test_filter(OWN_PID), number) == KILL


@given(number=st.integers(500, 0x3FFFFFFF))
def test_calls_of_later_kernels_do_not_exist(number):
    assert evaluate(_core.worker_filter(), number) == REFUSE | ENOSYS


@given(number=st.integers(0, 460), arguments=st.tuples(*[st.integers(0, 2**64 - 1)] * 6))
def test_every_answer_is_one_of_four(number, arguments):
    answer = evaluate(_core.worker_filter(), number, arguments)

    assert answer in {ALLOW, KILL} or answer & 0xFFFF0000 == REFUSE


def test_search_is_short():
    assert len(_core.worker_filter()) < 500
    assert len(_core.test_filter(OWN_PID)) < 100


def test_plain_calls():
    assert worker("read") == ALLOW
    assert worker("execve") == KILL
    assert worker("ptrace") == KILL
    assert worker("clone3") == REFUSE | ENOSYS


@given(flags=st.integers(0, 2**32 - 1))
def test_files_open_for_reading_only(flags):
    writes = flags & (1 | 2 | 0o100 | 0o1000)

    assert worker("openat", 0, 0, flags) == (REFUSE | EROFS if writes else ALLOW)
    assert worker("open", 0, flags) == (REFUSE | EROFS if writes else ALLOW)


@given(flags=st.integers(0, 2**32 - 1))
def test_only_threads_are_cloned_in_a_test(flags):
    is_thread = flags & 0x00010000

    assert in_a_test("clone", flags) == (ALLOW if is_thread else REFUSE | EAGAIN)
    assert in_a_test("fork") == REFUSE | EAGAIN


def test_new_namespaces_are_killed_but_for_pids():
    assert worker("clone", 0x20000000 | 17) == ALLOW  # CLONE_NEWPID: the worker's own
    for flag in (0x00020000, 0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x40000000):
        assert worker("clone", flag | 17) == KILL


@given(pid=st.integers(-(2**31), 2**31 - 1))
def test_a_test_signals_itself_only(pid):
    assert in_a_test("kill", pid) == (ALLOW if pid == OWN_PID else REFUSE | EPERM)
    assert in_a_test("tgkill", pid) == (ALLOW if pid == OWN_PID else REFUSE | EPERM)
    assert in_a_test("prlimit64", pid) == (ALLOW if pid == 0 else REFUSE | EPERM)


@given(address=st.integers(0, 2**64 - 1))
def test_messages_have_no_address(address):
    assert worker("sendto", 3, 0, 0, 0, address) == (REFUSE | EPERM if address else ALLOW)


@given(flags=st.integers(0, 2**32 - 1))
def test_memory_is_not_shared(flags):
    shared_and_anonymous = flags & 0x01 and flags & 0x20

    assert in_a_test("mmap", 0, 4096, 3, flags) == (REFUSE | EPERM if shared_and_anonymous else ALLOW)


@given(flags=st.integers(0, 2**32 - 1))
def test_no_urgent_data(flags):
    answer = REFUSE | EPERM if flags & 1 else ALLOW

    assert in_a_test("sendto", 3, 0, 0, flags) == answer
    assert in_a_test("recvfrom", 3, 0, 0, flags) == answer


@given(domain=st.integers(0, 50))
def test_no_socket_is_made(domain):
    assert worker("socket", domain) == (REFUSE | EPERM if domain == 1 else KILL)


@given(option=st.integers(0, 2**32 - 1))
def test_a_test_may_name_things_and_no_more(option):
    assert (in_a_test("prctl", option) == ALLOW) is (option in {15, 16, 0x53564D41})


@given(number=st.integers(0, 460))
def test_a_tests_filter_refuses_and_never_grants(number):
    assert evaluate(_core.test_filter(OWN_PID), number) in {ALLOW, REFUSE | EPERM, REFUSE | EAGAIN}
