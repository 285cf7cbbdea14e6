"""Model folders: weights in one file or several, read by the slice, written as they were."""

from __future__ import annotations

import json
import math
import resource
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from rlef.config import ConfigError
from rlef.families import read_shape
from rlef.pretrained import StoredWeights, read_pretrained, write_weights
from rlef.shards import check_weights
from tests.family_examples import MAX_FILE_BYTES, save_random

INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model in several files with an index, by transformers, in float32."""
    save_random("qwen2-tied", tmp_path / "model")
    return tmp_path / "model"


def change_index(folder: Path, **changes: str | None) -> None:
    """Where the index looks for a tensor; None takes it out."""
    content = json.loads((folder / INDEX).read_text())
    places = content["weight_map"] | {name.replace("__", "."): file for name, file in changes.items()}
    content["weight_map"] = {name: file for name, file in places.items() if file is not None}
    (folder / INDEX).write_text(json.dumps(content))


def change_first_file(folder: Path, **changes: torch.Tensor) -> None:
    file = min(folder.glob("*.safetensors"))
    save_file(load_file(file) | {name.replace("__", "."): tensor for name, tensor in changes.items()}, file)


def test_a_model_in_several_files_is_read_as_transformers_reads_it(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    assert len(list(folder.glob("*.safetensors"))) > 2
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    shape, weights = read_pretrained(folder)
    assert shape.model_type == "qwen2"
    assert weights.keys() == theirs.keys() - {"lm_head.weight"}
    for name, tensor in weights.items():
        assert torch.equal(tensor, theirs[name]), name


def test_a_slice_is_that_of_the_whole_tensor_in_the_type_that_is_stored(tmp_path: Path) -> None:
    whole = torch.randn(6, 4, dtype=torch.bfloat16)
    write_weights(tmp_path, [("matrix", whole), ("vector", whole[0].clone())])
    stored = StoredWeights(tmp_path)
    matrix = stored["matrix"]
    assert (matrix.shape, matrix.dtype) == ((6, 4), torch.bfloat16)
    assert torch.equal(matrix[2:5], whole[2:5])
    assert torch.equal(matrix[:, 1:3], whole[:, 1:3])
    assert torch.equal(stored["vector"][:], whole[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_that_was_read_in_float32_is_written_back_bit_for_bit(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    """Each of the 65,536 patterns, but for those of NaN, whose bits a conversion may change."""
    patterns = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(dtype)
    numbers = patterns[~patterns.isnan()]
    write_weights(tmp_path / "read", [("numbers", numbers)])
    ((name, read),) = StoredWeights(tmp_path / "read").tensors()
    assert read.dtype == torch.float32
    write_weights(tmp_path / "written", [(name, read.to(dtype))])
    assert (tmp_path / "written" / "model.safetensors").read_bytes() == (
        tmp_path / "read" / "model.safetensors"
    ).read_bytes()


@settings(max_examples=25)  # each file is synced to the disk
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=12), bound=st.integers(1, 20))
def test_files_are_bounded_and_hold_every_tensor_once(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], bound: int
) -> None:
    """But for one tensor that is larger on its own."""
    folder = tmp_path_factory.mktemp("written")
    named = {f"tensor {number}": torch.rand(size) for number, size in enumerate(sizes)}
    write_weights(folder, named.items(), max_file_bytes=4 * bound)
    files = [load_file(file) for file in sorted(folder.glob("*.safetensors"))]
    assert [name for file in files for name in sorted(file, key=list(named).index)] == list(named)
    assert all(len(file) == 1 or sum(map(len, file.values())) <= bound for file in files)
    assert len(files) >= math.ceil(sum(sizes) / max(bound, *sizes))
    assert (folder / INDEX).exists() == (len(files) > 1)
    stored = StoredWeights(folder)
    assert all(torch.equal(stored[name][:], tensor) for name, tensor in named.items())


def test_a_writer_lets_a_file_go_before_it_fills_the_next(tmp_path: Path) -> None:
    """Of nine tensors, three to a file, four are held at most: a file, and the one that opens the next."""
    arrays: list[weakref.ref[Any]] = []
    held = []

    def named() -> Iterator[tuple[str, torch.Tensor]]:
        for number in range(9):
            array = np.zeros(4, dtype=np.float32)
            arrays.append(weakref.ref(array))
            tensor = torch.from_numpy(array)
            del array  # the tensor keeps it
            held.append(sum(reference() is not None for reference in arrays))
            yield str(number), tensor

    write_weights(tmp_path, named(), max_file_bytes=3 * 16)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    assert max(held) == 4


def test_the_index_says_what_that_of_transformers_says(folder: Path, tmp_path: Path) -> None:
    stored = StoredWeights(folder)
    write_weights(tmp_path, ((name, part[:]) for name, part in stored.items()), max_file_bytes=MAX_FILE_BYTES)
    ours, theirs = (json.loads((place / INDEX).read_text()) for place in (tmp_path, folder))
    assert ours["weight_map"].keys() == theirs["weight_map"].keys()
    assert ours["metadata"]["total_size"] == theirs["metadata"]["total_size"]
    files = sorted(set(ours["weight_map"].values()))
    assert files == sorted(file.name for file in tmp_path.glob("*.safetensors"))
    assert files == [
        f"model-{number + 1:05d}-of-{len(files):05d}.safetensors" for number in range(len(files))
    ]


def test_a_writer_that_fails_leaves_no_file_that_looks_whole(tmp_path: Path) -> None:
    def broken() -> Iterator[tuple[str, torch.Tensor]]:
        yield "first", torch.zeros(4)
        yield "second", torch.zeros(4)
        raise RuntimeError("a rank has died")

    with pytest.raises(RuntimeError, match="a rank has died"):
        write_weights(tmp_path, broken(), max_file_bytes=16)
    assert not list(tmp_path.glob("[!.]*"))


def test_others_may_read_what_is_written(tmp_path: Path) -> None:
    write_weights(tmp_path, [("tensor", torch.zeros(2))])
    (tmp_path / "plain").touch()
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_rotary_frequencies_of_old_files_and_an_unused_head_are_passed_over(folder: Path) -> None:
    shape, before = read_pretrained(folder)
    first = min(file.name for file in folder.glob("*.safetensors"))
    added = {
        "model__layers__0__self_attn__rotary_emb__inv_freq": torch.ones(2),
        "lm_head__weight": torch.ones(2),
    }
    change_first_file(folder, **added)
    change_index(folder, **dict.fromkeys(added, first))
    stored = StoredWeights(folder)
    check_weights(stored, shape)
    assert stored.keys() == before.keys() | {"lm_head.weight"}


def refused(folder: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        check_weights(StoredWeights(folder), read_shape(folder))
    message = str(caught.value)
    assert message.startswith("model.path: ")
    assert "\n" not in message
    return message


def test_a_file_that_does_not_fit_the_address_space_is_refused_by_its_size(tmp_path: Path) -> None:
    size = 1 << 40
    numbers = {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}
    header = json.dumps({"large": numbers}).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size // 2, hard))
    try:
        with pytest.raises(ConfigError, match=r"of 1,099,511,627,8\d\d bytes does not fit .* \(ulimit -v\)"):
            StoredWeights(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    for file in folder.glob("*model*"):
        file.unlink()
    assert f"{folder} has no model.safetensors and no {INDEX}; name a Hugging Face" in refused(folder)


def test_a_missing_file_of_several_is_named(folder: Path) -> None:
    max(folder.glob("*.safetensors")).unlink()
    assert "-of-00004.safetensors is missing, but model.safetensors.index.json names it" in refused(folder)


def test_a_truncated_file_of_several_is_named(folder: Path) -> None:
    last = max(folder.glob("*.safetensors"))
    last.write_bytes(last.read_bytes()[:-10])
    assert f"{last} cannot be read (" in refused(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON ("),
        ("[]", "has no weight_map; copy it again"),
        ("{}", "has no weight_map; copy it"),
    ],
)
def test_a_broken_index_is_refused(folder: Path, content: str, message: str) -> None:
    (folder / INDEX).write_text(content)
    assert f"{folder / INDEX} {message}" in refused(folder)


@pytest.mark.parametrize("place", ["../model.safetensors", "/etc/passwd", ""])
def test_an_index_that_leads_out_of_the_folder_is_refused(folder: Path, place: str) -> None:
    change_index(folder, model__norm__weight=place)
    assert f"looks for model.norm.weight in {place!r}, which is no file of the folder" in refused(folder)


def test_an_index_that_names_the_wrong_file_is_refused(folder: Path) -> None:
    places = json.loads((folder / INDEX).read_text())["weight_map"]
    other = next(file for file in places.values() if file != places["model.norm.weight"])
    change_index(folder, model__norm__weight=other)
    assert f"{folder / other} lacks model.norm.weight, which {INDEX} says it holds" in refused(folder)


def test_a_tensor_that_is_missing_is_named(folder: Path) -> None:
    change_index(folder, model__norm__weight=None)
    assert "the weights lack model.norm.weight; name a whole model" in refused(folder)


def test_a_tensor_that_the_family_does_not_have_is_named(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    llama = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    (folder / "config.json").write_text(json.dumps(config | llama))
    assert (
        "the weights hold model.layers.0.self_attn.k_proj.bias, which no llama of config.json has; "
        "name a model without additions"
    ) in refused(folder)


def test_a_tensor_of_another_shape_is_named(folder: Path) -> None:
    change_first_file(folder, model__embed_tokens__weight=torch.zeros(31, 16))
    change_index(folder, model__embed_tokens__weight=min(file.name for file in folder.glob("*.safetensors")))
    assert "embed_tokens.weight has shape [31, 16], but config.json makes it [32, 16]" in refused(folder)


def test_quantised_weights_are_refused(folder: Path) -> None:
    change_first_file(folder, model__norm__weight=torch.zeros(16, dtype=torch.float8_e4m3fn))
    change_index(folder, model__norm__weight=min(file.name for file in folder.glob("*.safetensors")))
    assert "holds model.norm.weight as F8_E4M3; only F32, BF16, F16 are read" in refused(folder)
