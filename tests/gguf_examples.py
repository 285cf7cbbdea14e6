"""Small GGUF files, written as llama.cpp's converter writes them, with a chat template and a vocabulary."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize

from rlef.records import ModelShape
from rlef.torch_model import LlamaModel, initialise

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe brief.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ALPHABET = [chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]
MERGES = ["Ġ t", "Ġt h", "Ġth e", "Ġ Ġ", "h e", "he l", "l o", "hel lo", "1 2", "1 0", "Ċ Ċ"]
TOKENS = [*SPECIAL, *ALPHABET, *(merge.replace(" ", "") for merge in MERGES), "<think>"]
CONTROL, USER_DEFINED, NORMAL = 3, 4, 1
TYPES = [CONTROL] * len(SPECIAL) + [NORMAL] * (len(TOKENS) - len(SPECIAL) - 1) + [USER_DEFINED]

SHAPE = ModelShape(
    vocab_size=len(TOKENS),
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=512,
    rope_theta=100_000.0,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
)


def random_weights(shape: ModelShape) -> dict[str, torch.Tensor]:
    """Far from what a fresh model has, so that a weight in another's place shows."""
    model = LlamaModel(shape)
    initialise(model, seed=0)
    generator = torch.Generator().manual_seed(1)
    return {
        name: tensor + 0.3 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in model.state_dict().items()
    }


def write_gguf(
    file: Path,
    shape: ModelShape,
    weights: Mapping[str, torch.Tensor],
    *,
    stored_as: GGMLQuantizationType = GGMLQuantizationType.F32,
    splitting: str = "smollm",
    changed: Mapping[str, Any] | None = None,
    without: Collection[str] = (),
    extra_tensors: Mapping[str, np.ndarray[Any, Any]] | None = None,
) -> None:
    """Matrices are quantised to `stored_as`. Of the keys and tensors, those of `without` are left out."""
    family = shape.model_type
    keys: dict[str, Any] = {
        "general.license": "apache-2.0",
        f"{family}.block_count": shape.num_hidden_layers,
        f"{family}.context_length": shape.max_position_embeddings,
        f"{family}.embedding_length": shape.hidden_size,
        f"{family}.feed_forward_length": shape.intermediate_size,
        f"{family}.attention.head_count": shape.num_attention_heads,
        f"{family}.attention.head_count_kv": shape.num_key_value_heads,
        f"{family}.attention.key_length": shape.head_dim,
        f"{family}.attention.value_length": shape.head_dim,
        f"{family}.rope.freq_base": shape.rope_theta,
        f"{family}.attention.layer_norm_rms_epsilon": shape.rms_norm_eps,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": splitting,
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": TYPES,
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.chat_template": CHATML,
        **(changed or {}),
    }
    writer = GGUFWriter(file, keys.pop("general.architecture", family))
    for key, value in keys.items():
        if key not in without:
            kinds = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}
            kinds.get(type(value), writer.add_array)(key, value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[family.upper()], shape.num_hidden_layers)
    for name, tensor in weights.items():
        stored_name = names.get_name(name, (".weight", ".bias"))
        assert stored_name is not None
        values = tensor.numpy()
        if family == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            values = llama_cpp_rows(values, shape.head_dim)
        if stored_name in without:
            continue
        kind = stored_as if values.ndim == 2 else GGMLQuantizationType.F32
        writer.add_tensor(stored_name, quantize(values, kind), raw_dtype=kind)
    for name, array in (extra_tensors or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_cpp_rows(weight: np.ndarray[Any, Any], head_dim: int) -> np.ndarray[Any, Any]:
    """`permute` of llama.cpp's convert_hf_to_gguf.py."""
    heads = weight.shape[0] // head_dim
    return weight.reshape(heads, 2, head_dim // 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
