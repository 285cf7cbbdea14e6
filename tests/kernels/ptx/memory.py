"""Shared and global memory that know what may be touched, by whom, and when."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tests.kernels.ptx.faults import InFlight, Misaligned, OutOfBounds, Race, Uninitialised
from tests.kernels.ptx.program import Address, Immediate, Program, Vector
from tests.kernels.ptx.races import WARP, Accesses, Clock

Bytes = NDArray[np.uint8]  # [accesses, bytes of each]
Addresses = NDArray[np.int64]  # [accesses]
SECTOR = 32  # bytes: what DRAM and the caches move


def _require_aligned(addresses: Addresses, width: int) -> None:
    if (addresses % width).any():
        address = int(addresses[addresses % width != 0][0])
        raise Misaligned(f"{width} bytes at {address:#x}")


def _pieces(offsets: Addresses, width: int, granule: int) -> NDArray[np.int64]:
    """The granules of each access, `[accesses, pieces]`."""
    assert width % granule == 0, f"an access of {width} bytes divides a granule of {granule}"
    return offsets[:, None] // granule + np.arange(width // granule)


def _require_one_winner(accesses: Accesses, pieces: NDArray[np.int64], differs: NDArray[np.bool_]) -> None:
    """Of threads that write to one place at once, any one's value stands: if all are of the same warp."""
    if accesses.written_by_several_warps(pieces[differs.any(1)]).any():
        raise Race("warps write different values to the same place at once")


class Shared:
    """Of one block."""

    BEGIN = 1 << 16  # so that address 0 is nobody's

    def __init__(self, program: Program, clock: Clock) -> None:
        self._size = program.shared_bytes
        self._data = np.zeros(-(-self._size // 16) * 16, np.uint8)
        self._granule = min((_width(each) for each in program.instructions), default=16)
        pieces = len(self._data) // self._granule
        self._accesses = Accesses(pieces, clock)
        self._copies = np.zeros(pieces, np.int64)  # under way to each granule

    def load(
        self, addresses: Addresses, width: int, who: NDArray[np.int64], *, by_warp: bool = False
    ) -> Bytes:
        offsets, pieces = self._locate(addresses, width)
        self._require_landed(pieces)
        if not self._accesses.written(pieces).all():
            raise Uninitialised("shared memory that nothing was written to")
        self._accesses.read(pieces, who, by_warp=by_warp)
        return self._data.reshape(-1, width)[offsets // width]

    def store(self, addresses: Addresses, data: Bytes, who: NDArray[np.int64]) -> None:
        offsets, pieces = self._locate(addresses, data.shape[1])
        self._require_landed(pieces)
        self._put(offsets, pieces, data, who)

    def start_copy(self, addresses: Addresses, width: int, who: NDArray[np.int64]) -> None:
        """From now on the bytes may change at any time."""
        _, pieces = self._locate(addresses, width)
        self._require_landed(pieces)
        self._accesses.write(pieces, who)
        np.add.at(self._copies, pieces, 1)
        if (self._copies[pieces] > 1).any():
            raise Race("two copies to the same place")

    def finish_copy(self, addresses: Addresses, data: Bytes, who: NDArray[np.int64]) -> None:
        offsets, pieces = self._locate(addresses, data.shape[1])
        self._copies[pieces] = 0
        self._put(offsets, pieces, data, who)

    def _put(
        self, offsets: Addresses, pieces: NDArray[np.int64], data: Bytes, who: NDArray[np.int64]
    ) -> None:
        width = data.shape[1]
        words = self._data.reshape(-1, width)
        changed = (words[offsets // width] != data).reshape(*pieces.shape, -1).any(-1)
        self._accesses.write(pieces, who, changed)
        words[offsets // width] = data
        _require_one_winner(self._accesses, pieces, words[offsets // width] != data)

    def _locate(self, addresses: Addresses, width: int) -> tuple[Addresses, NDArray[np.int64]]:
        _require_aligned(addresses, width)
        offsets = addresses - self.BEGIN
        outside = (offsets < 0) | (offsets + width > self._size)
        if outside.any():
            raise OutOfBounds(f"shared memory at {int(offsets[outside][0])} of {self._size} bytes")
        return offsets, _pieces(offsets, width, self._granule)

    def _require_landed(self, pieces: NDArray[np.int64]) -> None:
        if self._copies[pieces].any():
            raise InFlight("shared memory that a copy is under way to")


def _width(instruction: Any) -> int:
    """Bytes of an access of shared memory; no access is wider than what is returned for anything else."""
    opcode, operands = instruction.opcode, instruction.operands
    if opcode[0] in ("ld", "st") and "shared" in opcode:
        (vector,) = (each for each in operands if not isinstance(each, Address))
        count = len(vector.elements) if isinstance(vector, Vector) else 1
        return count * int(opcode[-1].lstrip("bfsu")) // 8
    if opcode[:2] == ("cp", "async") and len(operands) > 1:
        assert isinstance(operands[2], Immediate)
        return operands[2].bits
    return 16


@dataclass(slots=True)
class Traffic:
    """Of global memory, counted where it leaves the threads."""

    loaded: int = 0  # bytes
    stored: int = 0
    loaded_sectors: int = 0  # of 32 bytes, once for each warp and instruction
    stored_sectors: int = 0


class _Buffer:
    """A copy of a storage, of whose bytes only those of the tensors of the launch may be touched."""

    def __init__(self, storage: torch.UntypedStorage, clock: Clock) -> None:
        self._storage = torch.empty(0, dtype=torch.uint8).set_(storage)
        self.address = storage.data_ptr()
        self.lead = self.address % 256  # where the copy begins, so that alignment is the storage's own
        size = -(-(self.lead + storage.nbytes()) // 16) * 16
        self.data = np.zeros(size, np.uint8)
        self.data[self.lead : self.lead + storage.nbytes()] = self._storage.numpy()
        self._is_ours = torch.zeros(size, dtype=torch.bool)
        self.granule = 16
        self.clock = clock

    def add(self, tensor: Tensor) -> None:
        size = tensor.element_size()
        self.granule = min(self.granule, size)
        begin = self.lead + tensor.storage_offset() * size
        shape, strides = (*tensor.shape, size), (*(size * each for each in tensor.stride()), 1)
        self._is_ours.as_strided(shape, strides, begin).fill_(True)

    def freeze(self) -> None:
        """All tensors are known."""
        self.accesses = Accesses(len(self.data) // self.granule, self.clock)
        self._ours_before = np.concatenate([[0], np.cumsum(self._is_ours.numpy())])

    def locate(self, offsets: Addresses, width: int) -> NDArray[np.int64]:
        ends = np.clip(offsets + width, 0, len(self.data))
        outside = self._ours_before[ends] - self._ours_before[np.minimum(offsets, ends)] != width
        if outside.any():
            offset = int(offsets[outside][0]) - self.lead
            raise OutOfBounds(f"{width} bytes at byte {offset} of a storage of {self._storage.numel()}")
        return _pieces(offsets, width, self.granule)

    def write_back(self) -> None:
        self._storage.numpy()[:] = self.data[self.lead : self.lead + self._storage.numel()]


class Global:
    """The tensors of a launch, at addresses of our own, far from one another."""

    _APART = 40  # bits of an address within a storage

    def __init__(self, tensors: Sequence[Tensor], clock: Clock) -> None:
        self.traffic = Traffic()
        self._buffers: dict[int, _Buffer] = {}
        for tensor in tensors:
            storage = tensor.untyped_storage()
            buffer = self._buffers.setdefault(storage.data_ptr(), _Buffer(storage, clock))
            buffer.add(tensor)
        self._slots = {key: slot for slot, key in enumerate(self._buffers, 1)}
        self._of_slot = {slot: self._buffers[key] for key, slot in self._slots.items()}
        for buffer in self._buffers.values():
            buffer.freeze()

    def address_of(self, tensor: Tensor) -> int:
        key = tensor.untyped_storage().data_ptr()
        offset = tensor.storage_offset() * tensor.element_size()
        return (self._slots[key] << self._APART) + self._buffers[key].lead + offset

    def load(self, addresses: Addresses, width: int, who: NDArray[np.int64]) -> Bytes:
        buffer, offsets, pieces = self._locate(addresses, width)
        buffer.accesses.read(pieces, who)
        self.traffic.loaded += width * len(who)
        self.traffic.loaded_sectors += _sectors(addresses, width, who)
        return buffer.data.reshape(-1, width)[offsets // width]

    def store(self, addresses: Addresses, data: Bytes, who: NDArray[np.int64]) -> None:
        width = data.shape[1]
        buffer, offsets, pieces = self._locate(addresses, width)
        words = buffer.data.reshape(-1, width)
        changed = (words[offsets // width] != data).reshape(*pieces.shape, -1).any(-1)
        buffer.accesses.write(pieces, who, changed)
        words[offsets // width] = data
        _require_one_winner(buffer.accesses, pieces, words[offsets // width] != data)
        self.traffic.stored += width * len(who)
        self.traffic.stored_sectors += _sectors(addresses, width, who)

    def write_back(self) -> None:
        for buffer in self._buffers.values():
            buffer.write_back()

    def _locate(self, addresses: Addresses, width: int) -> tuple[_Buffer, Addresses, NDArray[np.int64]]:
        _require_aligned(addresses, width)
        slots = Counter((addresses >> self._APART).tolist())
        if len(slots) > 1 or not slots.keys() <= self._of_slot.keys():
            raise OutOfBounds(f"global addresses such as {int(addresses[0]):#x}, of no tensor or of several")
        buffer = self._of_slot[next(iter(slots))]
        offsets = addresses & ((1 << self._APART) - 1)
        return buffer, offsets, buffer.locate(offsets, width)


def _sectors(addresses: Addresses, width: int, who: NDArray[np.int64]) -> int:
    of_warp = (who // WARP) << 56
    first, last = addresses // SECTOR, (addresses + width - 1) // SECTOR
    return len(np.unique(np.concatenate([of_warp + first, of_warp + last])))
