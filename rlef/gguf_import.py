"""GGUF files, in which llama.cpp keeps a whole model, made into model folders. The only door to `gguf`.

Llama, Qwen2 and Qwen3 with vocabularies of byte-level BPE. What a file is quantised to is what comes in: the
weights are computed from its blocks, in float32, tensor by tensor.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from rlef.byte_level_bpe import build_tokenizer
from rlef.chat_template import dialog_markers
from rlef.config import ConfigError
from rlef.families import config_of, read_shape
from rlef.files import sync, write_text
from rlef.pretrained import write_config, write_weights
from rlef.records import ModelShape, ModelType
from rlef.shards import stage_weights

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor

_FAMILIES: tuple[ModelType, ...] = ("llama", "qwen2", "qwen3")  # files call them the same
_DEFAULT_ROPE_THETA = 10_000.0  # what llama.cpp takes where a file names none
_CONTROL, _USER_DEFINED = 3, 4  # of the numbers in tokenizer.ggml.token_type

_Value = TypeVar("_Value", int, float, str, list[Any])


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """What came in."""

    shape: ModelShape
    parameters: int
    license: str  # as the file names it, or ""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Vocabulary:
    tokenizer: Tokenizer
    special: list[str]
    named: dict[str, str]  # the tokens that the file names, as transformers calls them


def import_gguf(file: Path, output: Path, *, dtype: torch.dtype = torch.float32) -> Imported:
    """Write the model in `file` as the folder `output`, which must be empty or missing.

    The weights are stored as `dtype`.

    Raises:
        ConfigError: what cannot be read, or is not implemented; `output` is then as it was.
    """
    try:
        metadata = _Metadata(_open(file))
        shape = _shape(metadata)
        tensors = _tensors(metadata, shape)
        vocabulary = _vocabulary(metadata, shape.vocab_size)
        template = metadata.read("tokenizer.chat_template", str)
        markers = dialog_markers(template, special_tokens=vocabulary.special, **vocabulary.named)
        license_name = metadata.read("general.license", str, "")
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None
    output = output.resolve()
    writing = output.with_name(f".{output.name}.writing")
    shutil.rmtree(writing, ignore_errors=True)  # of a command that was killed
    try:
        write_weights(writing, ((name, values.to(dtype)) for name, values in _weights(tensors, shape)))
        _write_vocabulary(writing, vocabulary, end=markers["end"])
        write_text(writing / "chat_template.jinja", template)
        _write_json(writing / "dialog.json", markers)
        end = vocabulary.tokenizer.token_to_id(markers["end"])
        pad = vocabulary.tokenizer.token_to_id(vocabulary.named.get("pad_token", markers["end"]))
        assert end is not None
        assert pad is not None
        write_config(writing, config_of(shape, end_token_id=end, pad_token_id=pad, dtype=dtype))
        assert read_shape(writing) == shape
        writing.replace(output)
        sync(output.parent)
    except BaseException:
        shutil.rmtree(writing, ignore_errors=True)
        raise
    parameters = sum(int(tensor.n_elements) for tensor in tensors.values())
    return Imported(shape=shape, parameters=parameters, license=license_name)


def pairs_to_halves(weight: Tensor, head_dim: int) -> Tensor:
    """Rows `[heads * head_dim, hidden]` in the order of Hugging Face, from llama.cpp's.

    Rotary embedding turns pairs of channels of a head. llama.cpp stores Llama's query and key with the two
    of a pair side by side, Hugging Face with half a head between them.
    """
    heads, hidden = weight.shape[0] // head_dim, weight.shape[1]
    return weight.view(heads, head_dim // 2, 2, hidden).transpose(1, 2).reshape(weight.shape)


def _open(file: Path) -> GGUFReader:
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError("to read it, pip install 'rlef[gguf]'")
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
    except OSError as error:
        raise ConfigError(f"cannot be read ({error.strerror}); name a GGUF file") from None
    except (ValueError, LookupError, OverflowError) as error:
        # The package does not check lengths: of a file that is cut off it tells how numpy failed.
        raise ConfigError(
            f"is cut off, damaged, no GGUF file, or has what the gguf package does not know ({error}); "
            "copy it again, or name another one"
        ) from None
    if reader.byte_order == "S":
        raise ConfigError("was written in the byte order of another machine; name one in this machine's")
    return reader


class _Metadata:
    """The keys and the tensors of a file. What is wrong with one is told by its name."""

    def __init__(self, reader: GGUFReader) -> None:
        self._reader = reader
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.family = self._family()

    def read(self, key: str, kind: type[_Value], default: _Value | None = None) -> _Value:
        """The value of a key; `ConfigError` if it is of another kind, or missing and without a default."""
        field = self._reader.fields.get(key)
        value = default if field is None else field.contents()
        if value is None:
            raise ConfigError(f"lacks {key!r}; name a file of a whole instruct model")
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ConfigError(f"{key} = {value!r} is not of type {kind.__name__}; name another file")
        return value

    def size(self, key: str, default: int | None = None) -> int:
        """A positive number of the family's own keys."""
        value = self.read(f"{self.family}.{key}", int, default)
        if value < 1:
            raise ConfigError(f"{self.family}.{key} = {value} must be at least 1; name another file")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """One of the family's own keys. Files hold float32: 1e-5 is that, and not 9.999999747378752e-06."""
        return float(str(np.float32(self.read(f"{self.family}.{key}", float, default))))

    def refuse(self, *keys: str) -> None:
        """Of the family's own keys, those that would change what is computed."""
        for key in keys:
            field = self._reader.fields.get(f"{self.family}.{key}")
            if field is not None and field.contents() not in {"none", 0}:
                raise ConfigError(
                    f"{self.family}.{key} = {field.contents()!r} is not implemented; name another model"
                )

    def _family(self) -> ModelType:
        named = self.read("general.architecture", str)
        for family in _FAMILIES:
            if family == named:
                return family
        raise ConfigError(
            f"general.architecture = {named!r} is not implemented, only {', '.join(_FAMILIES)}; "
            "name another model"
        )


def _shape(metadata: _Metadata) -> ModelShape:
    metadata.refuse("rope.scaling.type", "rope.scaling.factor", "attention.sliding_window", "expert_count")
    heads = metadata.size("attention.head_count")
    groups = metadata.size("attention.head_count_kv", heads)
    hidden = metadata.size("embedding_length")
    head_dim = metadata.size("attention.key_length", hidden // heads)
    rotated = metadata.size("rope.dimension_count", head_dim)
    value_dim = metadata.size("attention.value_length", head_dim)
    if heads % groups or head_dim % 2 or not rotated == value_dim == head_dim:
        raise ConfigError(
            f"{heads} heads on {groups} key-value heads, of {head_dim} channels of which {rotated} are "
            f"rotated, with values of {value_dim}: not implemented; name another model"
        )
    embedding = metadata.tensors.get("token_embd.weight")
    if embedding is None:
        raise ConfigError("lacks the tensor token_embd.weight; name a file of a whole model")
    return ModelShape(
        model_type=metadata.family,
        vocab_size=int(embedding.shape[-1]),
        hidden_size=hidden,
        intermediate_size=metadata.size("feed_forward_length"),
        num_hidden_layers=metadata.size("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=head_dim,
        max_position_embeddings=metadata.size("context_length"),
        rope_theta=metadata.number("rope.freq_base", _DEFAULT_ROPE_THETA),
        rms_norm_eps=metadata.number("attention.layer_norm_rms_epsilon"),
        tie_word_embeddings="output.weight" not in metadata.tensors,
    )


def _tensors(metadata: _Metadata, shape: ModelShape) -> dict[str, ReaderTensor]:
    """All tensors under their Hugging Face names: there, of their sizes, and of types that can be read."""
    from gguf import MODEL_ARCH, get_tensor_name_map
    from gguf.quants import dequantize

    names = get_tensor_name_map(MODEL_ARCH[metadata.family.upper()], shape.num_hidden_layers)
    left, tensors = dict(metadata.tensors), {}
    for weight in stage_weights(shape, "logits", stage=0, stages=1):
        for name, size in zip(weight.names, weight.shapes, strict=True):
            stored_as = names.get_name(name, (".weight", ".bias"))
            assert stored_as is not None, name
            tensor = left.pop(stored_as, None)
            if tensor is None:
                raise ConfigError(f"lacks the tensor {stored_as}; name a file of a whole model")
            found = tuple(int(length) for length in reversed(tensor.shape))
            if found != size:
                raise ConfigError(
                    f"{stored_as} has shape {list(found)}, but the numbers beside it make it {list(size)}; "
                    "name another file"
                )
            try:
                dequantize(tensor.data[:1], tensor.tensor_type)
            except NotImplementedError:
                raise ConfigError(
                    f"{stored_as} is stored as {tensor.tensor_type.name}, which the gguf package does not "
                    "compute back; name a file of another quantisation"
                ) from None
            tensors[name] = tensor
    if left:
        raise ConfigError(
            f"has a tensor {min(left)}, which is not implemented for {metadata.family}; name another model"
        )
    return tensors


def _weights(tensors: Mapping[str, ReaderTensor], shape: ModelShape) -> Iterator[tuple[str, Tensor]]:
    """All weights in float32, one after the other."""
    from gguf.quants import dequantize

    for name, tensor in tensors.items():
        values = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
        if shape.model_type == "llama" and name.endswith((".q_proj.weight", ".k_proj.weight")):
            values = pairs_to_halves(values, shape.head_dim)
        yield name, values


def _vocabulary(metadata: _Metadata, size: int) -> _Vocabulary:
    kind = metadata.read("tokenizer.ggml.model", str)
    if kind != "gpt2":
        raise ConfigError(
            f"tokenizer.ggml.model = {kind!r} is not implemented, only 'gpt2', which is byte-level BPE; "
            "name another model"
        )
    tokens = metadata.read("tokenizer.ggml.tokens", list)
    types = metadata.read("tokenizer.ggml.token_type", list)
    if not len(tokens) == len(types) <= size:
        raise ConfigError(
            f"{len(tokens)} tokenizer.ggml.tokens with {len(types)} tokenizer.ggml.token_type do not fit "
            f"a token_embd.weight of {size} rows; name another file"
        )
    of_type = {
        kind: [token for token, number in zip(tokens, types, strict=True) if number == kind]
        for kind in (_CONTROL, _USER_DEFINED)
    }
    tokenizer = build_tokenizer(
        tokens,
        metadata.read("tokenizer.ggml.merges", list),
        splitting=metadata.read("tokenizer.ggml.pre", str),
        special=of_type[_CONTROL],
        user_defined=of_type[_USER_DEFINED],
    )
    keys = {"bos_token": "bos_token_id", "eos_token": "eos_token_id", "pad_token": "padding_token_id"}
    ids = {name: metadata.read(f"tokenizer.ggml.{key}", int, -1) for name, key in keys.items()}
    return _Vocabulary(
        tokenizer=tokenizer,
        special=of_type[_CONTROL],
        named={name: tokens[token_id] for name, token_id in ids.items() if 0 <= token_id < len(tokens)},
    )


def _write_vocabulary(folder: Path, vocabulary: _Vocabulary, *, end: str) -> None:
    write_text(folder / "tokenizer.json", vocabulary.tokenizer.to_str(pretty=True))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    _write_json(folder / "tokenizer_config.json", {**config, **vocabulary.named, "eos_token": end})


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
