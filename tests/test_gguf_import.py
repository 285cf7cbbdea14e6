"""GGUF files come in as transformers reads them, and what does not fit is told by its name."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from gguf import GGMLQuantizationType
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from rlef.cli import main
from rlef.config import ConfigError, RolloutConfig
from rlef.families import read_config, read_shape
from rlef.gguf_import import import_gguf
from rlef.pretrained import StoredWeights, read_pretrained
from rlef.prompts import Dialog
from rlef.records import ModelShape
from tests.family_examples import transformers_logits
from tests.gguf_examples import CHATML, SHAPE, SPECIAL, TOKENS, TYPES, random_weights, write_gguf

SHAPES = {
    "llama": SHAPE,
    "llama-untied": replace(SHAPE, tie_word_embeddings=False, head_dim=24),
    "qwen2": replace(SHAPE, model_type="qwen2", rope_theta=1e6),
    "qwen3": replace(SHAPE, model_type="qwen3", head_dim=24, tie_word_embeddings=False),
}


def written(tmp_path: Path, shape: ModelShape = SHAPE, **changes: Any) -> Path:
    file = tmp_path / "model.gguf"
    write_gguf(file, shape, random_weights(shape), **changes)
    return file


def imported(tmp_path: Path, shape: ModelShape = SHAPE, **changes: Any) -> Path:
    import_gguf(written(tmp_path, shape, **changes), tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("name", SHAPES)
def test_a_model_comes_in_as_it_was_before_it_became_gguf(tmp_path: Path, name: str) -> None:
    shape, weights = read_pretrained(imported(tmp_path, SHAPES[name]))
    assert shape == SHAPES[name]
    before = random_weights(shape)
    assert weights.keys() == before.keys() - ({"lm_head.weight"} if shape.tie_word_embeddings else set())
    assert all(torch.equal(weights[key], before[key]) for key in weights)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_1"])
def test_the_weights_are_those_that_transformers_reads(tmp_path: Path, name: str, kind: str) -> None:
    shape = SHAPES[name]
    folder = imported(tmp_path, shape, stored_as=GGMLQuantizationType[kind])
    config = AutoConfig.from_pretrained(tmp_path, gguf_file="model.gguf")
    config.head_dim = shape.head_dim  # transformers does not read it of every family
    theirs = AutoModelForCausalLM.from_config(config)
    read = load_gguf_checkpoint(str(tmp_path / "model.gguf"), return_tensors=True, model_to_load=theirs)
    ours = dict(StoredWeights(folder).tensors())
    assert ours.keys() == read["tensors"].keys()
    assert all(torch.equal(ours[key], read["tensors"][key]) for key in ours)
    theirs.load_state_dict(read["tensors"], strict=False)
    theirs.tie_weights()
    token_ids = [1, 40, 200, 2, 77, len(TOKENS) - 1]
    with torch.no_grad():
        expected = theirs.float().eval()(torch.tensor([token_ids])).logits[0]
    torch.testing.assert_close(transformers_logits(folder, token_ids), expected, rtol=1e-4, atol=1e-4)


def test_weights_can_be_stored_as_bfloat16(tmp_path: Path) -> None:
    import_gguf(written(tmp_path), tmp_path / "model", dtype=torch.bfloat16)
    stored = StoredWeights(tmp_path / "model")
    before = random_weights(SHAPE)
    assert read_config(tmp_path / "model")["torch_dtype"] == "bfloat16"
    assert all(torch.equal(stored[key][:], before[key].bfloat16()) for key in stored)


def test_the_dialog_is_that_of_the_chat_template(tmp_path: Path) -> None:
    folder = imported(tmp_path)
    dialog = Dialog.read(folder, RolloutConfig())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": dialog.told(dialog.prompt("the 10"))}]
    ids = dialog.prompt("the 10")
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"] == ids
    ids += [*dialog.response("hello"), *dialog.feedback("the 12")]
    messages += [{"role": "assistant", "content": "hello"}, {"role": "user", "content": "the 12"}]
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"] == ids
    assert read_config(folder)["eos_token_id"] == dialog.end_token_id == TOKENS.index("<|im_end|>")


def test_special_and_user_defined_tokens_are_found_whole_and_only_the_former_are_special(
    tmp_path: Path,
) -> None:
    tokenizer = Tokenizer.from_file(str(imported(tmp_path) / "tokenizer.json"))
    added = tokenizer.get_added_tokens_decoder().values()
    assert [(token.content, token.special) for token in added] == [
        *((token, True) for token in SPECIAL),
        ("<think>", False),
    ]
    assert tokenizer.encode("the<think>").tokens == ["t", "he", "<think>"]


def test_everything_is_written_at_once_or_not_at_all(tmp_path: Path) -> None:
    """A tensor of a size that the file's numbers do not have is met before anything is written."""
    output = tmp_path / "model"
    output.mkdir()
    file = written(tmp_path, changed={"llama.feed_forward_length": 128})
    with pytest.raises(
        ConfigError, match=r"blk\.0\.ffn_gate\.weight has shape \[96, 64\], but .* \[128, 64\]"
    ):
        import_gguf(file, output)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "model.gguf"]
    assert not list(output.iterdir())


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.01, 0.05, 0.1, 0.2, 0.5, 0.9, 0.9999])
def test_a_file_that_is_cut_off_is_refused_wherever_it_ends(tmp_path: Path, share: float) -> None:
    whole = written(tmp_path)
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(whole.read_bytes()[: int(whole.stat().st_size * share)])
    with pytest.raises(
        ConfigError, match=r"cut\.gguf: is cut off, damaged, no GGUF file, or .*; copy it again"
    ):
        import_gguf(cut, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"PK" * 100)
    with pytest.raises(ConfigError, match=r"no GGUF file, .*\(GGUF magic invalid\)"):
        import_gguf(tmp_path / "model.gguf", tmp_path / "model")


@pytest.mark.parametrize(
    "key",
    [
        "llama.block_count",
        "llama.context_length",
        "llama.embedding_length",
        "llama.feed_forward_length",
        "llama.attention.head_count",
        "llama.attention.layer_norm_rms_epsilon",
        "tokenizer.ggml.model",
        "tokenizer.ggml.pre",
        "tokenizer.ggml.tokens",
        "tokenizer.ggml.token_type",
        "tokenizer.ggml.merges",
        "tokenizer.chat_template",
    ],
)
def test_a_key_that_is_missing_is_named(tmp_path: Path, key: str) -> None:
    with pytest.raises(
        ConfigError, match=f"model.gguf: lacks '{key}'; name a file of a whole instruct model"
    ):
        import_gguf(written(tmp_path, without={key}), tmp_path / "model")


@pytest.mark.parametrize("name", ["token_embd.weight", "blk.1.attn_q.weight", "output_norm.weight"])
def test_a_tensor_that_is_missing_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=f"model.gguf: lacks the tensor {name}"):
        import_gguf(written(tmp_path, without={name}), tmp_path / "model")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"general.architecture": "gemma3"},
            "general.architecture = 'gemma3' is not implemented, only llama, qwen2, qwen3",
        ),
        ({"tokenizer.ggml.model": "llama"}, "tokenizer.ggml.model = 'llama' is not implemented, only 'gpt2'"),
        (
            {"tokenizer.ggml.pre": "tekken"},
            "splitting 'tekken' is not implemented, only gpt-2, smollm, llama-bpe, qwen2",
        ),
        ({"tokenizer.ggml.merges": ["x yz"]}, "merges that do not fit the tokens"),
        (
            {"tokenizer.ggml.token_type": TYPES[1:]},
            "271 tokenizer.ggml.tokens with 270 tokenizer.ggml.token_type",
        ),
        ({"tokenizer.ggml.tokens": [*TOKENS[:-1], "!"]}, "271 tokens, but only 270 different ones"),
        ({"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type = 'yarn' is not implemented"),
        ({"llama.expert_count": 8}, "llama.expert_count = 8 is not implemented"),
        ({"llama.attention.head_count_kv": 3}, "4 heads on 3 key-value heads, of 16 channels"),
        ({"llama.rope.dimension_count": 8}, "of 16 channels of which 8 are rotated"),
        ({"llama.block_count": 0}, "llama.block_count = 0 must be at least 1"),
        ({"llama.block_count": "two"}, "llama.block_count = 'two' is not of type int"),
        ({"llama.attention.head_count": [4, 4]}, r"llama.attention.head_count = \[4, 4\] is not of type int"),
        ({"tokenizer.chat_template": "{{"}, "the chat template cannot be run"),
    ],
)
def test_what_is_not_implemented_or_does_not_fit_is_told_by_its_key(
    tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=f"model.gguf: .*{message}"):
        import_gguf(written(tmp_path, changed=changed), tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("name", ["rope_freqs.weight", "blk.0.attn_q.bias"])
def test_a_tensor_that_would_not_be_used_is_named(tmp_path: Path, name: str) -> None:
    file = written(tmp_path, extra_tensors={name: np.ones(64, dtype=np.float32)})
    with pytest.raises(ConfigError, match=f"has a tensor {name}, which is not implemented for llama"):
        import_gguf(file, tmp_path / "model")


def test_a_quantisation_that_cannot_be_computed_back_is_named_with_its_tensor(tmp_path: Path) -> None:
    file = written(
        tmp_path,
        without={"blk.1.ffn_up.weight"},
        extra_tensors={"blk.1.ffn_up.weight": np.ones((96, 64), dtype=np.int8)},
    )
    with pytest.raises(
        ConfigError, match=r"blk\.1\.ffn_up\.weight is stored as I8, which the gguf package does"
    ):
        import_gguf(file, tmp_path / "model")


def test_a_quantisation_that_nobody_knows_is_told_by_its_number(tmp_path: Path) -> None:
    file = written(tmp_path)
    content, name = bytearray(file.read_bytes()), b"blk.1.ffn_up.weight"
    place = content.index(name) + len(name) + 4 + 2 * 8  # after the name come the lengths of two dimensions
    content[place : place + 4] = (99).to_bytes(4, "little")
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"99\)? is not a valid GGMLQuantizationType"):
        import_gguf(file, tmp_path / "model")


def rlef(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


def test_the_command_says_what_came_in_and_under_which_license(tmp_path: Path) -> None:
    result = rlef("import-gguf", str(written(tmp_path)), str(tmp_path / "out"))
    assert result.exit_code == 0, result.output
    parameters = sum(tensor.numel() for tensor in random_weights(SHAPE).values())
    assert result.stdout == (
        f"wrote {tmp_path / 'out'}: llama of {parameters:,} parameters, license apache-2.0\n"
    )
    assert read_shape(tmp_path / "out") == SHAPE
    assert json.loads((tmp_path / "out" / "dialog.json").read_text())["end"] == "<|im_end|>"
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == CHATML


def test_the_command_refuses_a_folder_that_is_not_empty_and_a_file_that_is_not_there(tmp_path: Path) -> None:
    occupied = rlef("import-gguf", str(written(tmp_path)), str(tmp_path))
    assert (occupied.exit_code, occupied.stderr) == (
        2,
        f"rlef: error: {tmp_path} is not empty; name another folder\n",
    )
    missing = rlef("import-gguf", str(tmp_path / "no.gguf"), str(tmp_path / "out"))
    assert missing.exit_code == 2
    assert missing.stderr == (
        f"rlef: error: {tmp_path / 'no.gguf'}: cannot be read (No such file or directory); name a GGUF file\n"
    )


def test_without_the_gguf_package_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = written(tmp_path)
    monkeypatch.delitem(sys.modules, "gguf")
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(ConfigError, match=r"model\.gguf: to read it, pip install 'rlef\[gguf\]'"):
        import_gguf(file, tmp_path / "model")
