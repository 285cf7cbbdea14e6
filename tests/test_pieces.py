"""Any cut of whole tensors, saved, fills any other cut; on made-up tensors and processes that are none."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlef import checkpoint_files
from rlef.checkpoint_files import read_checkpoint, write_index, write_part
from rlef.pieces import HeldState, Piece, pieces_of, rectangles
from rlef.records import ModelShape, ModelType
from rlef.shards import Cut, cut_shard, parameter_blocks, stage_weights
from tests.megatron_examples import UNTIED
from tests.test_shards import MODEL_TYPES

SIZES = st.one_of(st.tuples(st.integers(1, 12)), st.tuples(st.integers(1, 5), st.integers(1, 6)))


@given(sizes=SIZES, data=st.data())
def test_a_flat_range_is_at_most_three_rectangles_in_its_order(
    sizes: tuple[int, ...], data: st.DataObject
) -> None:
    whole = torch.arange(torch.Size(sizes).numel()).view(sizes)
    begin = data.draw(st.integers(0, whole.numel()))
    end = data.draw(st.integers(begin, whole.numel()))
    boxes = list(rectangles(sizes, begin, end))
    parts = [whole[box.within(box_of(whole))].flatten() for box in boxes]
    assert len(boxes) <= 3
    assert torch.equal(torch.cat([torch.empty(0, dtype=torch.int64), *parts]), torch.arange(begin, end))


def box_of(tensor: Tensor) -> checkpoint_files.Box:
    return checkpoint_files.Box(offsets=(0,) * tensor.ndim, sizes=tuple(tensor.shape))


def shape_of(model_type: ModelType, *, tied: bool) -> ModelShape:
    return replace(
        UNTIED,
        model_type=model_type,
        num_key_value_heads=4,
        num_attention_heads=8,
        head_dim=3,
        num_hidden_layers=4,
        tie_word_embeddings=tied,
    )


SHAPES = st.builds(shape_of, st.sampled_from(MODEL_TYPES), tied=st.booleans())
LAYOUTS = st.tuples(  # tensor, pipeline, data; and whether the optimiser is divided
    st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]), st.integers(1, 3), st.booleans()
)


@given(shape=SHAPES, size=st.sampled_from([1, 2, 4]), data=st.data())
def test_the_blocks_of_a_parameter_are_its_elements_in_order(
    shape: ModelShape, size: int, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(0, size - 1))
    for weight in stage_weights(shape, "logits", stage=0, stages=1):
        whole = {name: torch.randn(sizes) for name, sizes in zip(weight.names, weight.shapes, strict=True)}
        parameter = cut_shard(list(whole.values()), weight.cut, shape, rank=rank, size=size)
        blocks = parameter_blocks(weight, shape, rank=rank, size=size)
        parts = [whole[block.name][block.box.within(box_of(whole[block.name]))] for block in blocks]
        assert torch.equal(torch.cat([part.flatten() for part in parts]), parameter.flatten())
        starts = [sum(part.numel() for part in parts[:number]) for number in range(len(parts))]
        assert [block.start for block in blocks] == starts


class Rank:
    """What one process of a layout holds of a network with made-up weights and one moment of each."""

    def __init__(self, shape: ModelShape, layout: tuple[int, int, int, bool], rank: int) -> None:
        tensor, stages, replicas, is_divided = layout
        replica, rest = divmod(rank, tensor * stages)
        stage, part = divmod(rest, tensor)
        self.pieces: list[Piece] = []
        for weight in stage_weights(shape, "logits", stage=stage, stages=stages):
            blocks = parameter_blocks(weight, shape, rank=part, size=tensor)
            elements = sum(block.box.elements for block in blocks)
            shards, shard = (tensor, part) if weight.cut is Cut.REPLICATED else (1, 0)
            everywhere = (shards * replicas, shard * replicas + replica)
            # As a distributed optimiser may: ranges that respect nothing.
            bounds = [elements * number // replicas for number in (replica, replica + 1)]
            begin, end = bounds if is_divided else (0, elements)
            for kind, first, length, (copies, own) in (
                ("weight", 0, elements, everywhere),
                ("exp_avg", begin, end - begin, (shards, shard) if is_divided else everywhere),
            ):
                self.pieces += pieces_of(
                    kind,
                    blocks,
                    torch.full((length,), torch.nan),
                    begin=first,
                    copies=(copies, None if weight.duplicate else own),
                )

    def take(self, whole: dict[str, Tensor]) -> None:
        """From the whole tensors, which no process has."""
        for piece in self.pieces:
            piece.data.copy_(self._of(whole, piece))

    def holds(self, whole: dict[str, Tensor]) -> bool:
        return all(torch.equal(piece.data, self._of(whole, piece)) for piece in self.pieces)

    @staticmethod
    def _of(whole: dict[str, Tensor], piece: Piece) -> Tensor:
        return whole[piece.name][piece.box.within(box_of(whole[piece.name]))]


def ranks_of(shape: ModelShape, layout: tuple[int, int, int, bool]) -> list[Rank]:
    tensor, stages, replicas, _ = layout
    return [Rank(shape, layout, rank) for rank in range(tensor * stages * replicas)]


@settings(max_examples=25)  # each of thousands of pieces
@given(shape=SHAPES, saved=LAYOUTS, loaded=LAYOUTS)
def test_what_one_layout_saves_fills_any_other(
    shape: ModelShape, saved: tuple[int, int, int, bool], loaded: tuple[int, int, int, bool]
) -> None:
    whole = whole_tensors(shape)
    savers, loaders = ranks_of(shape, saved), ranks_of(shape, loaded)
    for rank in savers:
        rank.take(whole)
    state = HeldState(facts={}, pieces=[piece for rank in savers for piece in rank.pieces])
    for rank in loaders:
        state.read(rank.pieces)
        assert rank.holds(whole)


@settings(max_examples=25)
@given(shape=SHAPES, layout=LAYOUTS)
def test_each_number_is_saved_by_one_process(shape: ModelShape, layout: tuple[int, int, int, bool]) -> None:
    counts = {name: torch.zeros(tensor.shape) for name, tensor in whole_tensors(shape).items()}
    for rank in ranks_of(shape, layout):
        for piece in rank.pieces:
            if piece.is_written:
                counts[piece.name][piece.box.within(box_of(counts[piece.name]))] += 1
    assert all(bool((count == 1).all()) for count in counts.values())


def whole_tensors(shape: ModelShape) -> dict[str, Tensor]:
    return {
        f"{kind}/{name}": torch.randn(size)
        for weight in stage_weights(shape, "logits", stage=0, stages=1)
        for name, size in zip(weight.names, weight.shapes, strict=True)
        for kind in ("weight", "exp_avg")
    }


def test_replicas_share_the_work_of_saving() -> None:
    written = [
        sum(piece.data.numel() for piece in rank.pieces if piece.is_written)
        for rank in ranks_of(UNTIED, (1, 1, 2, False))
    ]
    assert min(written) > 0.3 * sum(written)


def cut_rows(whole: Tensor, bounds: Sequence[int]) -> Iterator[Piece]:
    for begin, end in zip([0, *bounds], [*bounds, len(whole)], strict=True):
        yield Piece(name="net/weight", offsets=(begin, 0), data=whole[begin:end])


def stored(folder: Path, pieces: Sequence[Piece]) -> checkpoint_files.State:
    folder.mkdir(parents=True, exist_ok=True)
    files = write_part(folder, 0, pieces, "")
    write_index(folder, files, json.dumps({"step": 1, "states": {"net": {}}, "shared": {}}))
    return read_checkpoint(folder, [file.name for file in files]).states["net"]


def test_pieces_come_back_from_files_of_few_bytes_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_files, "FILE_BYTES", 100)
    whole = torch.randn(20, 3)
    state = stored(tmp_path, list(cut_rows(whole, [4, 5, 11])))
    assert len(list(tmp_path.glob("rank-*"))) == 3  # 48 and 12 bytes, 72, 108
    target = torch.full((7, 2), torch.nan)
    state.read([Piece(name="weight", offsets=(3, 1), data=target)])
    assert torch.equal(target, whole[3:10, 1:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.uint8])
def test_a_piece_is_saved_in_its_type_and_read_into_the_targets(tmp_path: Path, dtype: torch.dtype) -> None:
    numbers = torch.arange(12).view(4, 3)
    state = stored(tmp_path, list(cut_rows(numbers.to(dtype), [])))
    target = torch.zeros(4, 3, dtype=torch.float64)
    state.read([Piece(name="weight", offsets=(0, 0), data=target)])
    assert torch.equal(target, numbers.double())


def test_a_missing_part_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    whole = torch.randn(8, 2)
    first, _, last = cut_rows(whole, [3, 5])
    held = [copy.copy(piece) for piece in (first, last)]
    target = torch.full((8, 2), torch.nan)
    wanted = [
        Piece(name="weight", offsets=(0, 0), data=target[:3]),
        Piece(name="weight", offsets=(3, 0), data=target[3:]),
    ]
    message = r"6 of 10 numbers of weight from \[3, 0\] on were saved"
    with pytest.raises(ValueError, match=message):
        stored(tmp_path, held).read(wanted)
    assert bool(target.isnan().all())
