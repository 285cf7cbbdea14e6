"""The table of instructions: what each does to a block."""

from __future__ import annotations

from collections.abc import Callable

from tests.kernels.ptx.block import Block
from tests.kernels.ptx.program import Instruction

Operation = Callable[[Block, Instruction], None]
OPERATIONS: dict[str, Operation] = {}  # by the first part of the opcode


def operation(*names: str) -> Callable[[Operation], Operation]:
    def register(function: Operation) -> Operation:
        for name in names:
            assert name not in OPERATIONS
            OPERATIONS[name] = function
        return function

    return register


@operation("nop")
def _nop(block: Block, instruction: Instruction) -> None:
    pass
