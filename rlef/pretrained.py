"""Hugging Face model folders: the weights, in one safetensors file or in several with an index.

Weights are read slice by slice and written file by file, so that nobody holds more of a model than he needs.
`families` reads the `config.json` beside them; the tokenizer is left alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rlef.config import ConfigError
from rlef.families import config_of, read_shape
from rlef.files import replacing, sync, write_text
from rlef.records import ModelShape

EMBEDDED = "embedded"
MAX_FILE_BYTES = 2 * 1000**3
"""A model of more than this is written as several files; a writer holds one of them in memory."""

_ONE_FILE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# Files from the days of Llama 2 hold the rotary frequencies, which follow from the shape.
_DERIVED = ".rotary_emb.inv_freq"


class Sliceable(Protocol):
    """A tensor, or one in a file, of which only what is asked for is read."""

    @property
    def shape(self) -> torch.Size: ...

    def __getitem__(self, index: Any, /) -> Tensor: ...


Weights = Mapping[str, Sliceable]
"""Whole weights under their Hugging Face names, in memory or in files."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """A tensor of a safetensors file. What a slice gives has the type in which it is stored."""

    file: Path
    name: str
    shape: torch.Size
    stored_as: str  # the word of safetensors for its type

    @property
    def dtype(self) -> torch.dtype:
        """Raises `ConfigError` where the type is not that of plain weights."""
        if self.stored_as not in _DTYPES:
            raise ConfigError(
                f"model.path: {self.file} holds {self.name} as {self.stored_as}; only {', '.join(_DTYPES)} "
                "are read: name a model that is not quantised"
            )
        return _DTYPES[self.stored_as]

    def __getitem__(self, index: Any, /) -> Tensor:
        # The file is mapped anew each time: its pages count as this process's memory until it is closed, and
        # they would add up to the model.
        with safe_open(self.file, framework="pt") as weights:
            part: Tensor = weights.get_slice(self.name)[index]
            return part


class StoredWeights(Mapping[str, StoredTensor]):
    """The weights of a model folder under their Hugging Face names, none of which is read before it is
    sliced."""

    def __init__(self, folder: Path) -> None:
        """Read the headers of all files.

        Raises:
            ConfigError: a file is missing or truncated, or is not what the index says.
        """
        self._tensors: dict[str, StoredTensor] = {}
        for file, names in _files(folder).items():
            held = _read_header(file)
            for name in names if names is not None else held:
                if name not in held:
                    raise ConfigError(
                        f"model.path: {file} lacks {name}, which {_INDEX} says it holds; copy both again"
                    )
                if not name.endswith(_DERIVED):
                    self._tensors[name] = held[name]

    def __getitem__(self, name: str) -> StoredTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All of them, whole and in float32, one after the other."""
        for name, stored in self._tensors.items():
            assert stored.dtype in _DTYPES.values()
            yield name, stored[:].float()


def model_folder(path: str) -> Path:
    """The folder that `model.path` means: a path, or the model that rlef ships."""
    if path == EMBEDDED:
        return Path(str(resources.files("rlef") / "data" / "model"))
    return Path(path)


def read_pretrained(folder: Path) -> tuple[ModelShape, dict[str, Tensor]]:
    """The shape and the float32 weights of a model folder, all in memory, under their Hugging Face names."""
    shape = read_shape(folder)
    return shape, dict(StoredWeights(folder).tensors())


def _files(folder: Path) -> dict[Path, list[str] | None]:
    """The files of a model folder, and which tensors each is to hold; None where no index says so."""
    index = folder / _INDEX
    if (folder / _ONE_FILE).exists():  # transformers, too, looks for it first
        return {folder / _ONE_FILE: None}
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"model.path: {folder} has no {_ONE_FILE} and no {_INDEX}; name a Hugging Face model folder"
        ) from None
    except ValueError as error:
        raise ConfigError(f"model.path: {index} is not JSON ({error}); copy it again") from None
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConfigError(f"model.path: {index} has no weight_map; copy it again")
    files: dict[Path, list[str] | None] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file or Path(file).name != file:
            raise ConfigError(
                f"model.path: {index} looks for {name} in {file!r}, which is no file of the folder; "
                "copy it again"
            )
        names = files.setdefault(folder / file, [])
        assert names is not None
        names.append(name)
    return files


def _read_header(file: Path) -> dict[str, StoredTensor]:
    try:
        with safe_open(file, framework="pt") as weights:
            slices = {name: weights.get_slice(name) for name in weights.keys()}  # noqa: SIM118
            return {
                name: StoredTensor(
                    file=file,
                    name=name,
                    shape=torch.Size(part.get_shape()),
                    stored_as=part.get_dtype(),
                )
                for name, part in slices.items()
            }
    except FileNotFoundError:
        raise ConfigError(
            f"model.path: {file} is missing, but {_INDEX} names it; copy the folder again"
        ) from None
    except MemoryError:
        raise ConfigError(
            f"model.path: {file} of {file.stat().st_size:,} bytes does not fit this process's address space; "
            "raise its limit (ulimit -v), or write the model as several files"
        ) from None
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"model.path: {file} cannot be read ({error}); copy it again") from None


def write_pretrained(
    folder: Path,
    shape: ModelShape,
    weights: Mapping[str, Tensor],
    *,
    end_token_id: int,
    pad_token_id: int,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a model folder without a tokenizer, `config.json` last."""
    config = config_of(shape, end_token_id=end_token_id, pad_token_id=pad_token_id, dtype=dtype)
    write_weights(folder, ((name, tensor.to(dtype)) for name, tensor in weights.items()))
    write_config(folder, config)


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Write `config.json`. It makes a folder a model, so it comes when all else is there."""
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")


def write_weights(
    folder: Path, named: Iterable[tuple[str, Tensor]], *, max_file_bytes: int = MAX_FILE_BYTES
) -> None:
    """Write weights in the types that they have, as files of at most `max_file_bytes` and an index.

    Holds one file's tensors at a time. A tensor that is larger has a file to itself. One file has no index.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written: list[dict[str, int]] = []  # of each file, the bytes of its tensors
    for tensors in _by_file(named, max_file_bytes):
        file = _unnumbered(folder, len(written))
        with replacing(file) as writing:
            writing.touch()
            mode = writing.stat().st_mode
            save_file(tensors, writing, metadata={"format": "pt"})
            writing.chmod(mode)  # safetensors closes it to everyone else
        written.append({name: tensor.nbytes for name, tensor in tensors.items()})
    # How many there are is part of their names, and known only now.
    count = len(written)
    names = [f"model-{number + 1:05d}-of-{count:05d}.safetensors" for number in range(count)]
    names = [_ONE_FILE] if count == 1 else names
    for number, name in enumerate(names):
        _unnumbered(folder, number).rename(folder / name)
    sync(folder)
    if count > 1:
        index = {
            "metadata": {"total_size": sum(sum(sizes.values()) for sizes in written)},
            "weight_map": {
                tensor: name for name, sizes in zip(names, written, strict=True) for tensor in sizes
            },
        }
        write_text(folder / _INDEX, json.dumps(index, indent=2) + "\n")


def _unnumbered(folder: Path, number: int) -> Path:
    return folder / f".model-{number + 1:05d}.safetensors"


def _by_file(named: Iterable[tuple[str, Tensor]], max_file_bytes: int) -> Iterator[dict[str, Tensor]]:
    """The tensors of one file after the other, in a dictionary that is emptied before it is filled again."""
    tensors: dict[str, Tensor] = {}
    held = 0
    for name, tensor in named:
        if tensors and held + tensor.nbytes > max_file_bytes:
            yield tensors
            tensors.clear()
            held = 0
        tensors[name] = tensor.detach().to("cpu").contiguous()
        held += tensor.nbytes
    if tensors:
        yield tensors
