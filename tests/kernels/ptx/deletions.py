"""Programs with one barrier, or one wait for copies, left out: every one of them has to fail."""

from __future__ import annotations

from collections.abc import Callable
from itertools import takewhile

from tests.kernels.ptx.faults import Fault
from tests.kernels.ptx.program import Instruction, Program


def needless(program: Program, attempt: Callable[[Program], None]) -> list[str]:
    """Those without which the attempt goes well, although nothing excuses them.

    Without an excused one it may go well, but not wrong: an attempt that ends with no fault compares values.
    """
    found = []
    for place in waits_of(program):
        try:
            attempt(program.without(place))
        except Fault:
            continue
        if excuse(program, place) is None:
            found.append(f"line {program.instructions[place].line}: {program.instructions[place].text}")
    return found


def waits_of(program: Program) -> list[int]:
    opcodes = (("bar", "sync"), ("bar", "warp", "sync"), ("cp", "async", "wait_group"))
    return [place for opcode in opcodes for place in program.places(*opcode)]


def excuse(program: Program, place: int) -> str | None:
    """Why a program may be right without a barrier or a wait, read from its text; None if it should not be.

    It is no proof: that is the attempt without it, which finds no race and no wrong value.
    """
    instruction = program.instructions[place]
    before = [each for each in program.instructions[place - 1 :: -1] if each.uses_shared_memory]
    after = [each for each in program.instructions[place + 1 :] if each.uses_shared_memory]
    if not before or not after:
        return None
    if instruction.opcode[0] == "bar":
        if before[0].is_copy and after[0].is_copy:
            return "the copies that begin a loop fill different places"
        between = [*_up_to("bar", before), *_up_to("bar", after)]
        if all(each.opcode[0] in ("ld", "ldmatrix", "cp") and not each.is_copy for each in between):
            return "from the barrier before to the one after it, threads only read"
    if instruction.opcode[0] == "cp":
        if after[0].text == instruction.text:
            return "the same wait stands behind it"
        since = _up_to("cp", before)
        if instruction.text == next((each.text for each in before[len(since) :]), None):
            return "the same wait stands before it, and no copy between"
    return None


def _up_to(name: str, instructions: list[Instruction]) -> list[Instruction]:
    return list(takewhile(lambda each: each.opcode[0] != name, instructions))
