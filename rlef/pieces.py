"""The state of a network as rectangular pieces of whole tensors, so that any layout can take up any other's.

A whole tensor is one of the Hugging Face model: a weight, or a moment that an optimiser keeps of it. A rank
holds pieces of it, whichever its layout gives it, and what a piece is does not depend on the layout: two of
them overlap in a rectangle, or not at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol, TypeVar
from zlib import crc32

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """A rectangular part of a tensor: where it begins and how far it reaches, by dimension."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def elements(self) -> int:
        return prod(self.sizes)

    def overlap(self, other: Box) -> Box | None:
        """What is in both, or None."""
        begins = tuple(map(max, self.offsets, other.offsets))
        ends = tuple(map(min, self._ends, other._ends))
        sizes = tuple(end - begin for begin, end in zip(begins, ends, strict=True))
        return Box(offsets=begins, sizes=sizes) if all(size > 0 for size in sizes) else None

    def within(self, other: Box) -> tuple[slice, ...]:
        """The slices of `other`, a tensor of its own, that are this part."""
        return tuple(
            slice(offset - begin, offset - begin + size)
            for offset, size, begin in zip(self.offsets, self.sizes, other.offsets, strict=True)
        )

    def moved(self, by: Sequence[int]) -> Box:
        offsets = tuple(offset + more for offset, more in zip(self.offsets, by, strict=True))
        return Box(offsets=offsets, sizes=self.sizes)

    @property
    def _ends(self) -> tuple[int, ...]:
        return tuple(offset + size for offset, size in zip(self.offsets, self.sizes, strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A box of a whole tensor whose elements, row by row, follow each other in a parameter from `start`."""

    name: str  # of the whole tensor
    box: Box
    start: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Piece:
    """A box of a whole tensor in memory: what to save of it, or where to put what was saved."""

    name: str  # of the whole tensor
    offsets: tuple[int, ...]
    data: Tensor  # [box.sizes]
    is_written: bool = True  # False where another rank saves the same

    @property
    def box(self) -> Box:
        return Box(offsets=self.offsets, sizes=tuple(self.data.shape))


class State(Protocol):
    """What a network is to continue from, in memory or in files."""

    @property
    def facts(self) -> Mapping[str, Any]:
        """What is the same on every rank, as JSON takes it: which network it is, and what it counts."""
        ...

    def read(self, targets: Iterable[Piece]) -> None:
        """Fill `targets`, in their types. Raises ValueError, with nothing read, if a part is missing."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldState:
    """The part of a network's state that this process holds. The tensors are the live ones: save or copy them
    before the next update."""

    facts: Mapping[str, Any]
    pieces: Sequence[Piece]

    def read(self, targets: Iterable[Piece]) -> None:
        held: dict[str, list[Piece]] = {}
        for piece in self.pieces:
            if piece.is_written:
                held.setdefault(piece.name, []).append(piece)
        for target, piece, common in list(overlaps(targets, held)):
            target.data[common.within(target.box)].copy_(piece.data[common.within(piece.box)])


class _HasBox(Protocol):
    @property
    def box(self) -> Box: ...


_Part = TypeVar("_Part", bound=_HasBox)


def overlaps(
    targets: Iterable[Piece], parts: Mapping[str, Sequence[_Part]]
) -> Iterator[tuple[Piece, _Part, Box]]:
    """What to copy into `targets` from which of the `parts` of each whole tensor, which do not overlap.

    Raises ValueError if they leave an element of a target out.
    """
    for target in targets:
        found = 0
        for part in parts.get(target.name, ()):
            common = target.box.overlap(part.box)
            if common is not None:
                found += common.elements
                yield target, part, common
        if found != target.box.elements:
            raise ValueError(
                f"{found} of {target.box.elements} numbers of {target.name} from {list(target.offsets)} on "
                "were saved"
            )


def pieces_of(
    kind: str,
    blocks: Iterable[Block],
    flat: Tensor,
    *,
    begin: int = 0,
    copies: tuple[int, int | None] = (1, 0),
) -> Iterator[Piece]:
    """The pieces in elements `begin` to `begin + len(flat)` of a flattened parameter: views of `flat`.

    `copies`: how many ranks hold the same, and which of them this is; each saves its share. None: it saves
    nothing. `kind` says what of the weight it is, such as "weight" or "exp_avg".
    """
    count, own = copies
    for block in blocks:
        first = max(begin, block.start)
        last = min(begin + flat.numel(), block.start + block.box.elements)
        position = first - begin
        for box in rectangles(block.box.sizes, first - block.start, last - block.start):
            name, offsets = f"{kind}/{block.name}", box.moved(block.box.offsets).offsets
            yield Piece(
                name=name,
                offsets=offsets,
                data=flat[position : position + box.elements].view(box.sizes),
                is_written=crc32(f"{name}{offsets}".encode()) % count == own,
            )
            position += box.elements


def rectangles(sizes: tuple[int, ...], begin: int, end: int) -> Iterator[Box]:
    """Elements `begin` to `end` of a vector or matrix, counted row by row, as boxes in that order.

    There are at most three: the rest of a row, whole rows, and the beginning of one.
    """
    if len(sizes) == 1:
        if begin < end:
            yield Box(offsets=(begin,), sizes=(end - begin,))
        return
    _, width = sizes
    while begin < end:
        row, column = divmod(begin, width)
        if column == 0 and end - begin >= width:
            box = Box(offsets=(row, 0), sizes=((end - begin) // width, width))
        else:
            box = Box(offsets=(row, column), sizes=(1, min(width - column, end - begin)))
        yield box
        begin += box.elements


def require_same_network(saved: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Raises ValueError if a fact in `here` was another one when the state was saved."""
    for name, fact in here.items():
        if saved.get(name) != fact:
            raise ValueError(
                f"the saved network has {name} = {saved.get(name)}, this one {fact}; "
                "resume with the settings that it was saved with"
            )
