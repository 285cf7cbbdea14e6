"""Runs a program: all threads of a block together while they agree where they are, apart where they do not.

Blocks run one after another. Threads that part run the earliest instruction first, and so meet again. What
this order could hide, `races` finds: it asks what may happen, not what happens here.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from torch import Tensor

from tests.kernels.ptx import floats, integers, moves, warps  # noqa: F401  each fills the table of operations
from tests.kernels.ptx.block import Block
from tests.kernels.ptx.faults import Fault, InFlight, Stuck, Unsupported
from tests.kernels.ptx.memory import Global, Traffic
from tests.kernels.ptx.operations import OPERATIONS
from tests.kernels.ptx.program import Immediate, Instruction, Parameter, Program, Symbol
from tests.kernels.ptx.races import Clock

Argument = Tensor | int | float
ENDLESS = 1_000_000  # instructions of a block; no trial needs a tenth of them


def launch(program: Program, grid: Sequence[int], arguments: Sequence[Argument]) -> Traffic:
    """Run the program on tensors of this CPU, which it may change, and count what it moved.

    Parameters beyond the arguments, which Triton adds for itself, are 0.
    """
    clock = Clock(program.threads)
    memory = Global([each for each in arguments if isinstance(each, Tensor)], clock)
    assert len(arguments) <= len(program.parameters), (
        f"{program.name} has {len(program.parameters)} parameters"
    )
    given = [*arguments, *[0] * (len(program.parameters) - len(arguments))]
    words = {
        parameter.name: _word(parameter, value, memory)
        for parameter, value in zip(program.parameters, given, strict=True)
    }
    size = (*grid, 1, 1)[:3]
    with np.errstate(all="ignore"):
        for place in product(*(range(each) for each in size)):
            clock.start_block()
            _Run(program, Block(program, place, size, words, memory, clock)).to_its_end()
    memory.write_back()
    return memory.traffic


def _word(parameter: Parameter, value: Argument, memory: Global) -> int:
    if isinstance(value, Tensor):
        return memory.address_of(value)
    if isinstance(value, float):
        code = {"f32": "<f", "f64": "<d"}[parameter.kind]
        return int.from_bytes(struct.pack(code, value), "little")
    return int(value) & ((1 << 64) - 1)


@dataclass(slots=True)
class _Run:
    program: Program
    block: Block

    steps: int = 0

    def to_its_end(self) -> None:
        threads = self.block.threads
        at = np.zeros(threads, np.int64)  # [threads] the next instruction of each
        waiting, gone = np.zeros(threads, bool), np.zeros(threads, bool)
        while not gone.all():
            ready = ~waiting & ~gone
            if not ready.any():
                self._meet(at, waiting)
                continue
            place = int(at[ready].min())
            here = ready & (at == place)
            if here.all():
                place = self._together(place)
                at[:] = place
            if place < len(self.program.instructions):
                self._apart(place, here, at, waiting, gone)
            else:
                raise Stuck("threads run past the end of the program")
        if self.block.copies:
            raise InFlight("the program ends while asynchronous copies are under way")

    def _together(self, place: int) -> int:
        """Run what all threads do, up to where they may part or stop."""
        instructions = self.program.instructions
        while place < len(instructions):
            instruction = instructions[place]
            name = instruction.opcode[0]
            if name == "bra":
                taken = self._taken(instruction)
                if taken.all():
                    place = self._target(instruction)
                elif not taken.any():
                    place += 1
                else:
                    break
            elif name == "bar":
                if instruction.guard is not None:
                    break
                self._require_plain(instruction)
                if instruction.opcode[1] == "warp":
                    self.block.clock.pass_warp_barrier(np.ones(self.block.threads, bool))
                else:
                    self.block.clock.pass_barrier()
                place += 1
            elif name in ("ret", "exit"):
                break
            else:
                self._execute(place, instruction, None)
                place += 1
        return place

    def _apart(
        self, place: int, here: np.ndarray, at: np.ndarray, waiting: np.ndarray, gone: np.ndarray
    ) -> None:
        """One instruction of some threads."""
        instruction = self.program.instructions[place]
        taken = here & self._taken(instruction)
        at[here] = place + 1
        match instruction.opcode[0]:
            case "bra":
                at[taken] = self._target(instruction)
            case "ret" | "exit":
                gone |= taken
            case "bar":
                self._require_plain(instruction)
                if instruction.opcode[1] == "warp":
                    self.block.mask = taken
                    self.block.everyone("a barrier of the warp")
                    self.block.clock.pass_warp_barrier(taken)
                else:
                    at[taken] = place
                    waiting |= taken
            case _:
                self._execute(place, instruction, None if here.all() else here)

    def _meet(self, at: np.ndarray, waiting: np.ndarray) -> None:
        """All threads that have not left wait: at the same barrier, or for ever."""
        places = set(at[waiting].tolist())
        if len(places) > 1:
            lines = sorted(self.program.instructions[place].line for place in places)
            raise Stuck(f"threads wait at the barriers of lines {lines}")
        at[waiting] += 1
        waiting[:] = False
        self.block.clock.pass_barrier()

    def _count(self) -> None:
        self.steps += 1
        if self.steps > ENDLESS:
            raise Stuck("the program does not end")

    def _taken(self, instruction: Instruction) -> np.ndarray:
        self._count()
        if instruction.guard is None:
            return np.ones(self.block.threads, bool)
        return self.block.predicate(instruction.guard, negated=instruction.negated)

    def _target(self, instruction: Instruction) -> int:
        (label,) = instruction.operands
        assert isinstance(label, Symbol)
        return self.program.labels[label.name]

    def _require_plain(self, instruction: Instruction) -> None:
        """Of the barriers, those of the whole block and of whole warps."""
        plain = {("bar", "sync"): 0, ("bar", "warp", "sync"): 0xFFFFFFFF}
        (operand,) = instruction.operands if len(instruction.operands) == 1 else (None,)
        known = plain.get(instruction.opcode)
        if known is None or not isinstance(operand, Immediate) or operand.bits & 0xFFFFFFFF != known:
            raise Unsupported(f"line {instruction.line}: {instruction.text}")

    def _execute(self, place: int, instruction: Instruction, here: np.ndarray | None) -> None:
        self._count()
        mask = here
        if instruction.guard is not None:
            taken = self._taken(instruction)
            mask = taken if here is None else here & taken
            if not mask.any():
                return
            if mask.all():
                mask = None
        self.block.mask, self.block.clock.place = mask, place
        try:
            OPERATIONS[instruction.opcode[0]](self.block, instruction)
        except KeyError as unknown:
            if unknown.args != (instruction.opcode[0],):
                raise
            raise Unsupported(f"line {instruction.line}: {instruction.text}") from unknown
        except Fault as fault:
            raise type(fault)(f"line {instruction.line}: {instruction.text}: {fault}") from fault
