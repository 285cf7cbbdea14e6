"""One block of threads while it runs: its registers, its memory, and which of its threads are at work.

A register is an array with one word per thread, and never changes in place, so that moves may share it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.kernels.ptx.faults import Uninitialised, Unsupported
from tests.kernels.ptx.memory import Global, Shared
from tests.kernels.ptx.program import SHARED, Immediate, Operand, Program, Register, Special, Symbol, Vector
from tests.kernels.ptx.races import WARP, Clock

Array = NDArray[Any]
UNSIGNED = {bits: np.dtype(f"u{bits // 8}") for bits in (8, 16, 32, 64)}
SIGNED = {bits: np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)}
TYPES: dict[str, np.dtype[Any]] = {
    "pred": np.dtype(bool),
    **{f"{letter}{bits}": dtype for bits, dtype in UNSIGNED.items() for letter in "bu"},
    **{f"s{bits}": dtype for bits, dtype in SIGNED.items()},
    # The bits of the short floats are converted by hand, where an instruction names them.
    **dict.fromkeys(("f16", "bf16"), np.dtype("u2")),
    **dict.fromkeys(("f16x2", "bf16x2", "tf32"), np.dtype("u4")),
    "f32": np.dtype("f4"),
    "f64": np.dtype("f8"),
}


class Block:
    def __init__(
        self,
        program: Program,
        place: tuple[int, ...],
        grid: tuple[int, ...],
        arguments: dict[str, int],
        memory: Global,
        clock: Clock,
    ) -> None:
        self.threads = program.threads
        self.arguments = arguments
        self.memory = memory
        self.clock = clock
        self.shared = Shared(program, clock)
        self.mask: NDArray[np.bool_] | None = None  # [threads] that the instruction is for; None: for all
        self.committed = np.zeros(self.threads, np.int64)  # groups of asynchronous copies, of each thread
        self.copies: list[Any] = []  # under way
        self._widths = program.widths
        self._registers: dict[str, Array] = {}
        self._held: dict[tuple[Operand, str], Array] = {}  # what is the same whenever it is read
        self._everyone = np.arange(self.threads)
        self._special = {
            "%tid.x": self._everyone,
            "%tid.y": 0,
            "%tid.z": 0,
            "%laneid": self._everyone % WARP,
            "%ntid.x": self.threads,
            **{f"%ctaid.{axis}": number for axis, number in zip("xyz", place, strict=True)},
            **{f"%nctaid.{axis}": number for axis, number in zip("xyz", grid, strict=True)},
        }

    @property
    def who(self) -> NDArray[np.int64]:
        """The threads that the instruction is for."""
        return self._everyone if self.mask is None else np.flatnonzero(self.mask)

    def everyone(self, what: str) -> None:
        """Refuse to do for part of a warp what a warp does together."""
        if self.mask is not None:
            of_warps = self.mask.reshape(-1, WARP)
            if (of_warps.any(1) != of_warps.all(1)).any():
                raise Unsupported(f"{what} in part of a warp")

    def read(self, operand: Operand, kind: str) -> Array:
        """`[threads]`, in numpy's type of `kind`, or in the unsigned one of the same width."""
        if isinstance(operand, Register):
            if operand.name not in self._registers:
                raise Uninitialised(f"{operand.name} was never written")
            bits = self._registers[operand.name]
            dtype = TYPES[kind]
            if bits.dtype.itemsize != dtype.itemsize:
                assert bits.dtype.itemsize > dtype.itemsize, f"{operand.name} is too narrow for {kind}"
                bits = bits.astype(UNSIGNED[dtype.itemsize * 8])
            return bits if bits.dtype == dtype else bits.view(dtype)
        if (operand, kind) not in self._held:
            self._held[operand, kind] = self._constant(operand, kind)
        return self._held[operand, kind]

    def _constant(self, operand: Operand, kind: str) -> Array:
        dtype = TYPES[kind]
        if kind == "pred":
            assert isinstance(operand, Immediate)
            return np.full(self.threads, bool(operand.bits))
        unsigned = UNSIGNED[dtype.itemsize * 8]
        if isinstance(operand, Immediate):
            bits = operand.bits & ((1 << dtype.itemsize * 8) - 1)
            return np.full(self.threads, bits, unsigned).view(dtype)
        if isinstance(operand, Special) and operand.name in self._special:
            return np.broadcast_to(self._special[operand.name], self.threads).astype(unsigned).view(dtype)
        if operand == Symbol(SHARED):
            return np.full(self.threads, Shared.BEGIN, unsigned).view(dtype)
        raise Unsupported(f"{operand} as an operand")

    def addresses(self, operand: Operand) -> NDArray[np.int64]:
        """`[threads]`, of `[base + offset]`."""
        if operand.base is None:
            return np.full(self.threads, operand.offset, np.int64)
        wide = isinstance(operand.base, Register) and self._width(operand.base.name) == 64
        base = self.read(operand.base, "u64" if wide else "u32")
        return base.astype(np.int64) + operand.offset

    def _width(self, register: str) -> int:
        return self._widths.get(register) or self._widths[register.rstrip("0123456789")]

    def write(self, operand: Operand, value: Array) -> None:
        """For the threads that the instruction is for. Short signed numbers are extended by their sign."""
        assert isinstance(operand, Register)
        if operand.name == "_":
            return
        width = self._width(operand.name)
        if width == 1:
            bits = value.astype(bool)
        else:
            if value.dtype.itemsize * 8 != width:
                assert value.dtype.itemsize * 8 < width and value.dtype.kind in "iu", (
                    f"too wide: {value.dtype}"
                )
                value = value.astype((SIGNED if value.dtype.kind == "i" else UNSIGNED)[width])
            bits = value.view(UNSIGNED[width])
        if self.mask is not None:
            before = self._registers.get(operand.name)
            if before is None:
                before = np.ones_like(bits) if width == 1 else ~np.zeros_like(bits)  # NaN in every float type
            bits = np.where(self.mask, bits, before)
        self._registers[operand.name] = bits

    def predicate(self, name: str, *, negated: bool) -> NDArray[np.bool_]:
        value = self.read(Register(name), "pred")
        return ~value if negated else value


def elements(operand: Operand) -> tuple[Operand, ...]:
    return operand.elements if isinstance(operand, Vector) else (operand,)
