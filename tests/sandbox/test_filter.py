"""The system call filters of both architectures, instruction by instruction, in an evaluator of our own."""

from __future__ import annotations

import functools
import itertools
import os
import re
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlef_sandbox import _core

REPOSITORY = Path(__file__).parents[2]
ARCHITECTURES = ("x86_64", "aarch64")
AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7, "i386": 0x40000003, "arm": 0x40000028}
FIRST_ALIEN = {"x86_64": 0x40000000, "aarch64": 0x80000000}
ALLOW, KILL, REFUSE = 0x7FFF0000, 0x80000000, 0x00050000
EPERM, EAGAIN, EROFS, ENOSYS = 1, 11, 30, 38
OWN_PID = 4711

NUMBERS = {
    "x86_64": {
        "read": 0, "socket": 41, "clone": 56, "execve": 59, "kill": 62, "ptrace": 101, "sendto": 44, "prctl": 157,
        "tgkill": 234, "openat": 257, "prlimit64": 302, "clone3": 435, "open": 2, "fork": 57, "mmap": 9, "recvfrom": 45,
        "unlinkat": 263, "mknodat": 259, "setsid": 112, "setpgid": 109, "io_uring_setup": 425, "mount": 165,
    },
    "aarch64": {
        "read": 63, "socket": 198, "clone": 220, "execve": 221, "kill": 129, "ptrace": 117, "sendto": 206,
        "prctl": 167, "tgkill": 131, "openat": 56, "prlimit64": 261, "clone3": 435, "mmap": 222, "recvfrom": 207,
        "unlinkat": 35, "mknodat": 33, "setsid": 157, "setpgid": 154, "io_uring_setup": 425, "mount": 40,
    },
}  # fmt: skip

each_architecture = pytest.mark.parametrize("machine", ARCHITECTURES)
words = st.integers(0, 2**32 - 1)


# ---- a processor for classic BPF, as far as seccomp gives one


def evaluate(program, number: int, arguments: tuple[int, ...] = (), *, audit: int) -> int:
    padded = [*arguments, 0, 0, 0, 0, 0, 0][:6]
    data = struct.pack("<IIQ6Q", number, audit, 0, *(value % 2**64 for value in padded))
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


def assert_the_kernel_would_take(program) -> None:
    """What the kernel checks before it installs a filter: every path ends inside, every load is a field."""
    assert 0 < len(program) <= 4096
    for at, (code, if_true, if_false, k) in enumerate(program):
        if code == 0x20:
            assert k % 4 == 0 and k < 64
        left = len(program) - at - 1
        if code != 0x06:
            assert left > (k if code == 0x05 else max(if_true, if_false))


# ---- what a policy means: its table, read from the top


class Rule(NamedTuple):
    number: int
    action: int
    when: str = "always"
    argument: int = 0
    value: int = 0
    values: tuple[int, ...] = ()
    otherwise: int = 0

    def answer(self, arguments: tuple[int, ...]) -> int:
        argument = arguments[self.argument]
        low = argument % 2**32  # what the kernel itself reads of these arguments
        holds = {
            "always": True,
            "equal": low == self.value,
            "one_of": low in self.values,
            "has_bits": low & self.value == self.value,
            "lacks_bits": low & self.value == 0,
            "is_null": argument == 0,
        }[self.when]
        return self.action if holds else self.otherwise


class Policy(NamedTuple):
    rules: list[Rule]
    unnamed: int
    beyond: int
    first_alien: int
    architecture: int

    def answer(self, number: int, arguments: tuple[int, ...], audit: int) -> int:
        if self.architecture not in (0, audit) or number >= self.first_alien:
            return KILL
        for rule in self.rules:
            if rule.number == number:
                return rule.answer(arguments)
        return self.beyond if number > max(rule.number for rule in self.rules) else self.unnamed

    def compiled(self):
        return _core.compile_policy(self)


def read(policy) -> Policy:
    rules, *rest = policy
    return Policy([Rule(*rule) for rule in rules], *rest)


WORKER = {machine: read(_core.worker_policy(machine)) for machine in ARCHITECTURES}
TEST = {machine: read(_core.test_policy(OWN_PID, machine, may_fork=False)) for machine in ARCHITECTURES}
FORKING_TEST = {
    machine: read(_core.test_policy(OWN_PID, machine, may_fork=True)) for machine in ARCHITECTURES
}
COMMAND = {
    rights: {machine: read(_core.command_policy("fork" in rights, "write" in rights, machine)) for machine in ARCHITECTURES}
    for rights in ("command", "command-fork", "command-write", "command-fork-write")
}  # fmt: skip
OURS = {
    f"{kind}-{machine}": of[machine]
    for kind, of in {"worker": WORKER, "test": TEST, "forking-test": FORKING_TEST, **COMMAND}.items()
    for machine in of
}
COMPILED = {name: policy.compiled() for name, policy in OURS.items()}
each_policy = pytest.mark.parametrize("name", OURS)


@pytest.mark.parametrize("machine", ARCHITECTURES)
@given(own_pid=st.integers(1, 2**22))
def test_filter_made_beforehand_is_the_one_compiled_for_the_pid(machine, own_pid):
    compiled = read(_core.test_policy(own_pid, machine, may_fork=False)).compiled()

    assert _core.test_filter(own_pid, machine) == compiled


def near(value: int) -> st.SearchStrategy[int]:
    return st.sampled_from([value, (value - 1) % 2**32, (value + 1) % 2**32])


def numbers_for(policy: Policy) -> st.SearchStrategy[int]:
    named = st.sampled_from([rule.number for rule in policy.rules]).flatmap(near)
    edges = st.sampled_from([0, policy.first_alien, 2**31, 2**32 - 1]).flatmap(near)
    return named | edges | words


def arguments_for(rule: Rule | None) -> st.SearchStrategy[tuple[int, ...]]:
    """Six arguments: low words that the rule asks about, one bit off or near them, under any high word."""
    interesting = [0, 2**31, 2**32 - 1] if rule is None else [0, rule.value, *rule.values]
    one_bit_off = st.tuples(st.sampled_from(interesting), st.integers(0, 31)).map(
        lambda both: both[0] ^ (1 << both[1])
    )
    low = st.sampled_from(interesting).flatmap(near) | one_bit_off | words
    high = st.sampled_from([0, 1, 2**31, 2**32 - 1]) | words
    return st.tuples(*[st.tuples(high, low).map(lambda both: both[0] << 32 | both[1])] * 6)


@st.composite
def calls(draw, policy: Policy) -> tuple[int, tuple[int, ...], int]:
    number = draw(numbers_for(policy))
    rule = next((rule for rule in policy.rules if rule.number == number), None)
    audit = draw(st.sampled_from([policy.architecture, policy.architecture, *AUDIT.values(), 0]) | words)
    return number, draw(arguments_for(rule)), audit


@st.composite
def policies(draw) -> Policy:
    """Tables that nobody would write: few or many rules, in rows or far apart, with any condition."""
    actions = st.sampled_from([ALLOW, KILL, REFUSE | EPERM, REFUSE | ENOSYS])
    values = st.sampled_from([0, 1, 2**31, 2**32 - 1]) | words
    numbers = draw(st.sets(st.integers(0, 40) | st.integers(0, 1000), min_size=1, max_size=80))
    rules = [
        Rule(
            number,
            draw(actions),
            draw(
                st.sampled_from(["always", "always", "equal", "one_of", "has_bits", "lacks_bits", "is_null"])
            ),
            draw(st.integers(0, 5)),
            draw(values),
            tuple(draw(st.lists(values, max_size=12))),
            draw(actions),
        )
        for number in draw(st.permutations(sorted(numbers)))
    ]
    first_alien = draw(st.sampled_from([max(numbers) + 1, 0x40000000, 0x80000000]))
    return Policy(
        rules, draw(actions), draw(actions), first_alien, draw(st.sampled_from([0, AUDIT["x86_64"]]))
    )


@each_policy
@given(data=st.data())
def test_our_filters_answer_what_their_tables_say(name, data):
    number, arguments, audit = data.draw(calls(OURS[name]))

    assert evaluate(COMPILED[name], number, arguments, audit=audit) == OURS[name].answer(
        number, arguments, audit
    )


@each_policy
def test_our_filters_answer_every_number_as_their_tables(name):
    policy = OURS[name]
    for number, argument in itertools.product(range(600), (0, 1, 2**32, 2**64 - 1)):
        arguments = (argument,) * 6
        expected = policy.answer(number, arguments, policy.architecture)
        assert evaluate(COMPILED[name], number, arguments, audit=policy.architecture) == expected


@given(data=st.data(), policy=policies())
def test_any_table_compiles_to_what_it_says(data, policy):
    program = policy.compiled()

    assert_the_kernel_would_take(program)
    for number, arguments, audit in data.draw(st.lists(calls(policy), min_size=10, max_size=10)):
        assert evaluate(program, number, arguments, audit=audit) == policy.answer(number, arguments, audit)


def test_a_branch_farther_than_a_conditional_jump_reaches():
    values = tuple(range(100, 300))
    policy = Policy([Rule(n, ALLOW, "one_of", 1, 0, values, KILL) for n in range(8)], KILL, KILL, 2**30, 0)
    program = policy.compiled()

    assert_the_kernel_would_take(program)
    assert any(code == 0x05 and k > 255 for code, _, _, k in program)
    for number, value in itertools.product(range(9), (99, 100, 299, 300)):
        expected = ALLOW if number < 8 and value in values else KILL
        assert evaluate(program, number, (0, value), audit=0) == expected


def test_more_values_than_a_conditional_jump_can_pass_are_refused():
    policy = Policy([Rule(0, ALLOW, "one_of", 0, 0, tuple(range(256)), KILL)], KILL, KILL, 2**30, 0)

    with pytest.raises(RuntimeError, match="a jump too far"):
        policy.compiled()


def test_a_number_named_twice_is_refused():
    policy = Policy([Rule(3, ALLOW), Rule(5, KILL), Rule(3, KILL)], KILL, KILL, 2**30, 0)

    with pytest.raises(RuntimeError, match="a system call named twice"):
        policy.compiled()


def test_an_architecture_without_a_policy_is_refused():
    with pytest.raises(ValueError, match="architecture is 'mips': give 'x86_64' or 'aarch64'"):
        _core.worker_policy("mips")


@each_policy
def test_search_is_short_and_the_kernel_would_take_it(name):
    assert len(COMPILED[name]) < (100 if "test" in name else 500)
    assert_the_kernel_would_take(COMPILED[name])


# ---- the numbers


def numbers_of_our_own() -> dict[str, dict[str, int | None]]:
    header = (REPOSITORY / "csrc/call_numbers.hpp").read_text()
    lines = re.findall(r"^constexpr SystemCall (\w+)\{(\w+), (\w+)\};$", header, re.MULTILINE)
    assert len(lines) == header.count("constexpr SystemCall ") > 200
    return {
        machine: {line[0]: None if line[column] == "kAbsent" else int(line[column]) for line in lines}
        for column, machine in enumerate(ARCHITECTURES, start=1)
    }


def numbers_of_header(header: str, *macros: str) -> dict[str, int]:
    """What the kernel's own header says, as the compiler's preprocessor reads it."""
    compiler = [os.environ.get("CXX", "c++"), "-E", "-dM", "-xc++", *(f"-D{macro}" for macro in macros), "-"]
    done = subprocess.run(compiler, input=f"#include <{header}>", capture_output=True, text=True, check=True)
    defined = dict(re.findall(r"^#define (__NR\w+) (\w+)$", done.stdout, re.MULTILINE))
    numbers = {}
    for name, value in defined.items():
        while value in defined:
            value = defined[value]
        if name.startswith("__NR_") and value.isdigit():
            numbers[name.removeprefix("__NR_")] = int(value)
    return numbers


def disagreements(ours: dict[str, int | None], kernels: dict[str, int]) -> Iterator[tuple[str, int | None]]:
    for name, number in ours.items():
        is_young = number is not None and number >= 424  # older headers may lack it
        if (name in kernels or not is_young) and kernels.get(name) != number:
            yield name, number


def test_numbers_are_those_of_this_machines_kernel():
    ours = numbers_of_our_own()[os.uname().machine]

    assert not list(disagreements(ours, numbers_of_header("asm/unistd.h")))


def test_numbers_of_aarch64_are_those_of_the_generic_table():
    kernels = numbers_of_header("asm-generic/unistd.h", "__ARCH_WANT_NEW_STAT", "__ARCH_WANT_SET_GET_RLIMIT",
                                "__ARCH_WANT_SYS_CLONE3", "__ARCH_WANT_RENAMEAT",
                                "__BITS_PER_LONG=64")  # fmt: skip

    assert len(kernels) > 250
    assert not list(disagreements(numbers_of_our_own()["aarch64"], kernels))


def test_young_calls_have_one_number_everywhere():
    ours = numbers_of_our_own()

    for name, number in ours["x86_64"].items():
        if number is not None and number >= 424:
            assert ours["aarch64"][name] == number


@each_architecture
def test_every_call_that_has_a_number_is_in_a_policy(machine):
    named = {number for number in numbers_of_our_own()[machine].values() if number is not None}
    policies = WORKER, COMMAND["command-fork-write"]

    assert {rule.number for policy in policies for rule in policy[machine].rules} == named


# ---- what the policies say


def worker(machine: str, name: str, *arguments: int) -> int:
    return evaluate(COMPILED[f"worker-{machine}"], NUMBERS[machine][name], arguments, audit=AUDIT[machine])


def in_a_test(machine: str, name: str, *arguments: int) -> int:
    return evaluate(COMPILED[f"test-{machine}"], NUMBERS[machine][name], arguments, audit=AUDIT[machine])


def in_a_command(machine: str, rights: str, name: str, *arguments: int) -> int:
    return evaluate(COMPILED[f"{rights}-{machine}"], NUMBERS[machine][name], arguments, audit=AUDIT[machine])


@pytest.mark.parametrize("other", [*AUDIT, None])
@each_architecture
@given(number=words)
def test_other_architectures_are_killed(machine, other, number):
    if other != machine:
        assert evaluate(COMPILED[f"worker-{machine}"], number, audit=AUDIT.get(other, 0)) == KILL


@each_architecture
@given(data=st.data())
def test_x32_and_negative_numbers_are_killed(machine, data):
    number = data.draw(st.integers(FIRST_ALIEN[machine], 2**32 - 1))

    assert evaluate(COMPILED[f"worker-{machine}"], number, audit=AUDIT[machine]) == KILL
    assert evaluate(COMPILED[f"test-{machine}"], number, audit=AUDIT[machine]) == KILL


@each_architecture
@given(number=st.integers(500, 0x3FFFFFFF))
def test_calls_of_later_kernels_do_not_exist(machine, number):
    assert evaluate(COMPILED[f"worker-{machine}"], number, audit=AUDIT[machine]) == REFUSE | ENOSYS


@each_architecture
@given(number=st.integers(0, 460), arguments=st.tuples(*[st.integers(0, 2**64 - 1)] * 6))
def test_every_answer_is_one_of_four(machine, number, arguments):
    answer = evaluate(COMPILED[f"worker-{machine}"], number, arguments, audit=AUDIT[machine])

    assert answer in {ALLOW, KILL} or answer & 0xFFFF0000 == REFUSE


@each_architecture
def test_plain_calls(machine):
    assert worker(machine, "read") == ALLOW
    assert worker(machine, "execve") == KILL
    assert worker(machine, "ptrace") == KILL
    assert worker(machine, "clone3") == REFUSE | ENOSYS


@each_architecture
@given(flags=words)
def test_files_open_for_reading_only(machine, flags):
    writes = flags & (1 | 2 | 0o100 | 0o1000)
    expected = REFUSE | EROFS if writes else ALLOW

    assert worker(machine, "openat", 0, 0, flags) == expected
    if machine == "x86_64":
        assert worker(machine, "open", 0, flags) == expected


@each_architecture
@given(flags=words)
def test_only_threads_are_cloned_in_a_test(machine, flags):
    is_thread = flags & 0x00010000

    assert in_a_test(machine, "clone", flags) == (ALLOW if is_thread else REFUSE | EAGAIN)
    if machine == "x86_64":
        assert in_a_test(machine, "fork") == REFUSE | EAGAIN


@each_architecture
def test_new_namespaces_are_killed(machine):
    for flag in (0x00020000, 0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000):
        assert worker(machine, "clone", flag | 17) == KILL


@each_architecture
@given(pid=st.integers(-(2**31), 2**31 - 1))
def test_a_test_signals_itself_only(machine, pid):
    assert in_a_test(machine, "kill", pid) == (ALLOW if pid == OWN_PID else REFUSE | EPERM)
    assert in_a_test(machine, "tgkill", pid) == (ALLOW if pid == OWN_PID else REFUSE | EPERM)
    assert in_a_test(machine, "prlimit64", pid) == (ALLOW if pid == 0 else REFUSE | EPERM)


@each_architecture
@given(address=st.integers(0, 2**64 - 1))
def test_messages_have_no_address(machine, address):
    assert worker(machine, "sendto", 3, 0, 0, 0, address) == (REFUSE | EPERM if address else ALLOW)


@each_architecture
@given(flags=words)
def test_memory_is_not_shared(machine, flags):
    shared_and_anonymous = flags & 0x01 and flags & 0x20

    answer = in_a_test(machine, "mmap", 0, 4096, 3, flags)

    assert answer == (REFUSE | EPERM if shared_and_anonymous else ALLOW)


@each_architecture
@given(flags=words)
def test_no_urgent_data(machine, flags):
    answer = REFUSE | EPERM if flags & 1 else ALLOW

    assert in_a_test(machine, "sendto", 3, 0, 0, flags) == answer
    assert in_a_test(machine, "recvfrom", 3, 0, 0, flags) == answer


@each_architecture
@given(domain=st.integers(0, 50))
def test_no_socket_is_made(machine, domain):
    assert worker(machine, "socket", domain) == (REFUSE | EPERM if domain == 1 else KILL)


@each_architecture
@given(option=words)
def test_a_test_may_name_things_and_no_more(machine, option):
    assert (in_a_test(machine, "prctl", option) == ALLOW) is (option in {15, 16, 0x53564D41})


@each_architecture
@given(number=st.integers(0, 460))
def test_a_tests_filter_refuses_and_never_grants(machine, number):
    answer = evaluate(COMPILED[f"test-{machine}"], number, audit=AUDIT[machine])

    assert answer in {ALLOW, REFUSE | EPERM, REFUSE | EAGAIN}


# ---- commands


@each_architecture
@given(number=st.integers(0, 600), arguments=st.tuples(*[st.integers(0, 2**64 - 1)] * 6))
def test_a_command_without_rights_may_little_that_a_python_program_may_not(machine, number, arguments):
    """It is executed, has threads of its own make, and is told kindly what there is not."""
    names = {value: name for name, value in numbers_of_machine(machine).items() if value is not None}
    python, command = (
        evaluate(COMPILED[f"{kind}-{machine}"], number, arguments, audit=AUDIT[machine])
        for kind in ("worker", "command")
    )

    if names.get(number) not in {"execve", "execveat", "arch_prctl", "mincore", "socket"} | KINDLY_REFUSED:
        assert command == python
    elif names[number] in KINDLY_REFUSED | {"socket"}:
        assert command & 0xFFFF0000 == REFUSE


KINDLY_REFUSED = {"io_setup", "io_uring_enter", "io_uring_register", "io_uring_setup"} | {
    prefix + name for prefix in ("", "l", "f") for name in ("getxattr", "listxattr")
} | {"llistxattr"}  # fmt: skip


@functools.cache
def numbers_of_machine(machine: str) -> dict[str, int | None]:
    return numbers_of_our_own()[machine]


@each_architecture
@pytest.mark.parametrize("rights", COMMAND)
def test_no_right_opens_what_is_dangerous_or_leaves_the_process_group(machine, rights):
    for name in ("mknodat", "setsid", "setpgid"):
        assert in_a_command(machine, rights, name) == REFUSE | EPERM
    assert in_a_command(machine, rights, "mount") == KILL
    assert in_a_command(machine, rights, "ptrace") == KILL
    assert in_a_command(machine, rights, "clone", 0x10000000) == KILL  # a user namespace
    assert in_a_command(machine, rights, "io_uring_setup") == REFUSE | ENOSYS


@each_architecture
@pytest.mark.parametrize("rights", COMMAND)
def test_files_are_changed_by_those_only_who_may_write(machine, rights):
    may_write = "write" in rights

    assert in_a_command(machine, rights, "openat", 0, 0, 1) == (ALLOW if may_write else REFUSE | EROFS)
    assert in_a_command(machine, rights, "unlinkat") == (ALLOW if may_write else REFUSE | EPERM)


@each_architecture
def test_processes_are_forked_by_those_only_who_may(machine):
    forking = COMPILED[f"forking-test-{machine}"]
    number = NUMBERS[machine]["clone"]

    assert in_a_test(machine, "clone", 17) == REFUSE | EAGAIN
    assert evaluate(forking, number, (17,), audit=AUDIT[machine]) == ALLOW
    assert in_a_command(machine, "command-fork", "clone", 17) == ALLOW
    if machine == "x86_64":
        assert in_a_command(machine, "command", "fork") == REFUSE | EPERM
        assert in_a_command(machine, "command-fork", "fork") == ALLOW
