"""Moves between registers and memory, and asynchronous copies."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tests.kernels.ptx.block import SIGNED, UNSIGNED, Block, elements
from tests.kernels.ptx.faults import Unsupported
from tests.kernels.ptx.operations import operation
from tests.kernels.ptx.program import Address, Immediate, Instruction, Symbol, Vector, bits_of

HINTS = (  # of caches: they change no value
    *(f"L1::{each}" for each in ("evict_first", "evict_last", "evict_normal", "no_allocate")),
    *("L2::cache_hint", "L2::evict_first", "L2::evict_last", "fractional"),
    *("L2::64B", "L2::128B", "L2::256B", "ca", "cg", "cs", "wb", "lu", "nc"),
)


@operation("mov")
def _move(block: Block, instruction: Instruction) -> None:
    kind = instruction.kind
    instruction.only(kind)
    destination, source = instruction.operands
    if isinstance(destination, Vector):
        bits = bits_of(kind) // len(destination.elements)
        word = block.read(source, f"u{bits_of(kind)}")
        for place, each in enumerate(destination.elements):
            block.write(each, (word >> word.dtype.type(bits * place)).astype(UNSIGNED[bits]))
    elif isinstance(source, Vector):
        bits, word_type = bits_of(kind) // len(source.elements), UNSIGNED[bits_of(kind)].type
        word = np.zeros(block.threads, word_type)
        for place, each in enumerate(source.elements):
            word |= block.read(each, f"u{bits}").astype(word_type) << word_type(bits * place)
        block.write(destination, word)
    else:
        block.write(destination, block.read(source, kind))


@operation("cvta")
def _to_generic(block: Block, instruction: Instruction) -> None:
    instruction.only("to", "global", "u64")
    block.write(instruction.operands[0], block.read(instruction.operands[1], "u64"))


@operation("createpolicy")
def _cache_policy(block: Block, instruction: Instruction) -> None:
    instruction.only(*HINTS, "b64")
    block.write(instruction.operands[0], np.zeros(block.threads, np.uint64))


@operation("ld")
def _load(block: Block, instruction: Instruction) -> None:
    kind, (destination, address, *_) = instruction.kind, instruction.operands
    assert isinstance(address, Address)
    bits = bits_of(kind)
    if "param" in instruction.opcode:
        instruction.only("param", kind)
        assert isinstance(address.base, Symbol) and address.offset == 0
        word = np.uint64(block.arguments[address.base.name])
        words = np.full(block.threads, word).astype(UNSIGNED[bits])
        block.write(destination, words.view(SIGNED[bits]) if kind[0] == "s" else words)
        return
    instruction.only("global", "shared", "v2", "v4", *HINTS, kind)
    targets, who = elements(destination), block.who
    width = bits // 8 * len(targets)
    memory = block.memory if "global" in instruction.opcode else block.shared
    data = memory.load(block.addresses(address)[who], width, who)
    found = np.ascontiguousarray(data).view(SIGNED[bits] if kind[0] == "s" else UNSIGNED[bits])
    for place, each in enumerate(targets):
        word = np.zeros(block.threads, found.dtype)
        word[who] = found[:, place]
        block.write(each, word)


@operation("st")
def _store(block: Block, instruction: Instruction) -> None:
    kind, (address, source, *_) = instruction.kind, instruction.operands
    instruction.only("global", "shared", "v2", "v4", *HINTS, kind)
    who, unsigned = block.who, f"u{bits_of(kind)}"
    words = np.stack([block.read(each, unsigned)[who] for each in elements(source)], axis=1)
    memory = block.memory if "global" in instruction.opcode else block.shared
    memory.store(block.addresses(address)[who], words.view(np.uint8), who)


@dataclass(slots=True)
class Copy:
    """One `cp.async` of some threads, whose bytes have been read and not been written."""

    threads: NDArray[np.int64]
    groups: NDArray[np.int64]  # the group of each thread that it belongs to
    addresses: NDArray[np.int64]
    data: NDArray[np.uint8]  # [copies, bytes]


@operation("cp")
def _copy(block: Block, instruction: Instruction) -> None:
    instruction.only("async", "commit_group", "wait_group", "wait_all", *HINTS, "shared", "global")
    if "commit_group" in instruction.opcode:
        block.committed = block.committed + _ones(block)
    elif "wait_group" in instruction.opcode:
        (latest,) = instruction.operands
        assert isinstance(latest, Immediate)
        _finish(block, block.committed - latest.bits)
    elif "wait_all" in instruction.opcode:
        _finish(block, block.committed + 1)
    else:
        _start(block, instruction)


def _ones(block: Block) -> NDArray[np.int64]:
    return np.isin(np.arange(block.threads), block.who).astype(np.int64)


def _start(block: Block, instruction: Instruction) -> None:
    """Copies of fewer bytes than there is room for fill the rest with zeros."""
    target, source, room, *given = instruction.operands
    assert isinstance(room, Immediate)
    who, width = block.who, room.bits
    sizes = block.read(given[0], "u32")[who].astype(np.int64) if given else np.full(len(who), width)
    data = np.zeros((len(who), width), np.uint8)
    sources, targets = block.addresses(source)[who], block.addresses(target)[who]
    full = sizes == width
    if (~full & (sizes != 0)).any():
        raise Unsupported("an asynchronous copy of a part")
    if full.any():
        data[full] = block.memory.load(sources[full], width, who[full])
    block.shared.start_copy(targets, width, who)
    block.copies.append(Copy(who, block.committed[who], targets, data))


def _finish(block: Block, before: NDArray[np.int64]) -> None:
    """The copies of the groups before some, for the threads that wait: each sees its own, and no other's."""
    waits = _ones(block).astype(bool)
    held = []
    for copy in block.copies:
        done = waits[copy.threads] & (copy.groups < before[copy.threads])
        if done.any():
            block.shared.finish_copy(copy.addresses[done], copy.data[done], copy.threads[done])
        if not done.all():
            rest = ~done
            held.append(Copy(copy.threads[rest], copy.groups[rest], copy.addresses[rest], copy.data[rest]))
    block.copies = held
