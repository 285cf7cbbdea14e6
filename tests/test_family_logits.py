"""Models that transformers made compute here what they compute there, and leave as they came.

One launch of four ranks, two tensor parallel by two pipeline parallel, plays all families; the tests look at
what it recorded and wrote.
"""

from __future__ import annotations

import os
from collections import deque
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from rlef.config import ParallelConfig
from rlef.families import read_config, read_shape
from rlef.packing import pack
from rlef.ports import Request, SamplingParams
from rlef.pretrained import StoredWeights, read_pretrained, write_config, write_weights
from rlef.records import Batch
from rlef.torch_model import LlamaModel
from rlef.torch_sampler import TorchSampler
from tests.distributed import run_ranks
from tests.family_examples import FAMILIES, MAX_FILE_BYTES, save_random, transformers_logits
from tests.megatron_examples import SMOOTH
from tests.ppo_examples import episode

TENSOR, PIPELINE = 2, 2
MODELS = "RLEF_TEST_MODELS"  # an environment variable, which tells the ranks where the models are
TOKENS = torch.randint(0, 32, (40,), generator=torch.Generator().manual_seed(1))


def batch() -> Batch:
    return replace(
        pack([episode("." * (len(TOKENS) - 1) + "#")], value_level="turn"), token_ids=TOKENS.clone()
    )


def play() -> dict[str, torch.Tensor]:
    """On one rank: writes what came in, and returns its part of the logits of each family, if it has any."""
    return {family: play_family(Path(os.environ[MODELS]) / family) for family in FAMILIES}


def play_family(folder: Path) -> torch.Tensor:
    from rlef.megatron_policy import MegatronNetwork, initialize

    state = initialize(ParallelConfig(processes=TENSOR * PIPELINE, tensor=TENSOR, pipeline=PIPELINE))
    stored = StoredWeights(folder)
    network = MegatronNetwork(read_shape(folder), stored, head="logits", optimizer=SMOOTH, lr=0.0)
    named = network.named_weights()
    if state.rank == 0:
        typed = ((name, tensor.to(stored[name].dtype)) for name, tensor in named)
        write_weights(written_from(folder), typed, max_file_bytes=MAX_FILE_BYTES)
        write_config(written_from(folder), read_config(folder))
    else:
        deque(named, maxlen=0)
    seen = torch.empty(0)

    def look(logits: torch.Tensor, _: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        nonlocal seen
        seen = logits.detach().clone()
        return logits.sum() * 0.0, {}

    network.update([batch()], look)
    return seen


def written_from(folder: Path) -> Path:
    return folder.with_name(f"{folder.name} written")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        save_random(family, folder / family)
    return folder


@pytest.fixture(scope="module")
def ranks(models: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, torch.Tensor]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(MODELS, str(models))
        return run_ranks(play, ranks=TENSOR * PIPELINE, folder=tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def folder(models: Path, family: str) -> Path:
    return models / family


@pytest.fixture(scope="module")
def expected(folder: Path) -> torch.Tensor:
    return transformers_logits(folder, TOKENS.tolist())


def assert_same_logits(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert expected.abs().max() > 1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_torch_twin_computes_the_logits_of_transformers(folder: Path, expected: torch.Tensor) -> None:
    shape, weights = read_pretrained(folder)
    model = LlamaModel(shape)
    model.load_named(weights)
    pack_ = batch()
    with torch.no_grad():
        assert_same_logits(model(pack_.token_ids, pack_.position_ids, pack_.cu_seqlens), expected)


def test_the_embedded_sampler_draws_from_the_distribution_of_transformers(
    folder: Path, expected: torch.Tensor
) -> None:
    """Both while it reads a prompt and while it decodes token after token."""
    shape, weights = read_pretrained(folder)
    sampler = TorchSampler(shape, end_token_id=-1, slots=1)
    sampler.push(weights.items(), version=0)
    prompt = TOKENS.tolist()[:8]
    params = SamplingParams(temperature=1.0, top_p=1.0, max_tokens=30, seed=1)
    (response,) = sampler.generate([Request(stream=0, token_ids=prompt)], params)
    logits = transformers_logits(folder, prompt + response.token_ids)[len(prompt) - 1 : -1]
    logprobs = logits.log_softmax(-1).gather(1, torch.tensor(response.token_ids)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(response.logprobs), logprobs, rtol=1e-4, atol=1e-4)


@pytest.mark.multiprocess
def test_four_megatron_ranks_compute_the_logits_of_transformers(
    ranks: list[dict[str, torch.Tensor]], family: str, expected: torch.Tensor
) -> None:
    """The last stage has them, split over the vocabulary."""
    parts = [rank[family] for rank in ranks if rank[family].numel()]
    assert len(parts) == TENSOR
    assert_same_logits(torch.cat(parts, dim=1), expected)


@pytest.mark.multiprocess
def test_what_four_megatron_ranks_write_is_what_they_read_bit_for_bit(
    ranks: list[dict[str, torch.Tensor]], folder: Path
) -> None:
    read, written = stored_bits(folder), stored_bits(written_from(folder))
    assert len(list(written_from(folder).glob("model-*.safetensors"))) > 1
    assert written.keys() == read.keys()
    for name, tensor in read.items():
        assert written[name].dtype == tensor.dtype, name
        assert torch.equal(written[name].view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.mark.multiprocess
def test_transformers_computes_the_same_from_what_four_megatron_ranks_wrote(
    ranks: list[dict[str, torch.Tensor]], folder: Path, expected: torch.Tensor
) -> None:
    assert torch.equal(transformers_logits(written_from(folder), TOKENS.tolist()), expected)


def stored_bits(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of all files of a folder, read by nothing of ours."""
    tensors = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as weights:
            tensors |= {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118
    return tensors
