"""The embedded sampler against the plain model, and its random numbers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlef.ports import Request, Response, SamplingParams
from rlef.records import ModelShape
from rlef.torch_model import LlamaModel, initialise
from rlef.torch_sampler import TorchSampler, sampling_logprobs, uniforms

END = 3
SHAPE = ModelShape(
    vocab_size=24,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    rope_theta=10000.0,
    rms_norm_eps=1e-6,
    tie_word_embeddings=False,
)
PROMPTS = ([5], [6, 7, 8], [9] * 17, [4, 5], [10, 11, 12, 13, 14])


@pytest.fixture(scope="module")
def model() -> LlamaModel:
    model = LlamaModel(SHAPE)
    initialise(model, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0)  # far from uniform, so that a wrong distribution shows
    return model


def sampler(model: LlamaModel, *, slots: int = 8, context: int | None = None) -> TorchSampler:
    made = TorchSampler(SHAPE, end_token_id=END, slots=slots, context=context)
    made.push(model.state_dict().items(), version=7)
    return made


def params(
    *, temperature: float = 1.0, top_p: float = 1.0, max_tokens: int = 12, seed: int = 1
) -> SamplingParams:
    return SamplingParams(temperature=temperature, top_p=top_p, max_tokens=max_tokens, seed=seed)


def requests() -> list[Request]:
    return [Request(stream=100 + index, token_ids=ids) for index, ids in enumerate(PROMPTS)]


def whole_logits(model: LlamaModel, token_ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        length = len(token_ids)
        return model(
            torch.tensor(token_ids), torch.arange(length), torch.tensor([0, length], dtype=torch.int32)
        )


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.0, 0.8), (0.2, 0.95)])
def test_logprobs_are_those_of_the_distribution_sampled_from(
    model: LlamaModel, temperature: float, top_p: float
) -> None:
    responses = sampler(model).generate(requests(), params(temperature=temperature, top_p=top_p))
    for prompt, response in zip(PROMPTS, responses, strict=True):
        logits = whole_logits(model, prompt + response.token_ids)[len(prompt) - 1 : -1]
        logprobs = sampling_logprobs(logits, temperature=temperature, top_p=top_p)
        expected = logprobs.gather(1, torch.tensor(response.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(response.logprobs), expected, rtol=1e-4, atol=1e-5)


def test_a_slow_twin_that_recomputes_everything_samples_the_same_tokens(model: LlamaModel) -> None:
    responses = sampler(model).generate(requests(), params())
    for request, response in zip(requests(), responses, strict=True):
        ids = list(request.token_ids)
        while len(ids) - len(request.token_ids) < 12 and (
            len(ids) == len(request.token_ids) or ids[-1] != END
        ):
            probabilities = whole_logits(model, ids)[-1].double().softmax(-1)
            draw = uniforms(1, np.array([request.stream], np.uint64), np.array([len(ids)], np.uint64))[0]
            ids.append(int((probabilities.cumsum(0) <= draw).sum()))
        assert response.token_ids == ids[len(request.token_ids) :]


@pytest.mark.parametrize("slots", [1, 2, 3, 8])
def test_a_response_does_not_depend_on_the_slots_or_on_its_neighbours(model: LlamaModel, slots: int) -> None:
    together = sampler(model, slots=slots).generate(requests(), params())
    alone = [sampler(model).generate([request], params())[0] for request in requests()]
    assert [response.token_ids for response in together] == [response.token_ids for response in alone]


def test_another_seed_or_stream_samples_another_response(model: LlamaModel) -> None:
    request = Request(stream=1, token_ids=[5])
    base = sampler(model).generate([request], params())[0].token_ids
    assert sampler(model).generate([request], params(seed=2))[0].token_ids != base
    assert sampler(model).generate([Request(stream=2, token_ids=[5])], params())[0].token_ids != base


def test_temperature_zero_takes_the_most_probable_token(model: LlamaModel) -> None:
    response = sampler(model).generate([Request(stream=0, token_ids=[5])], params(temperature=0.0))[0]
    logits = whole_logits(model, [5, *response.token_ids])
    assert response.token_ids == logits.argmax(-1)[: len(response.token_ids)].tolist()
    assert response.logprobs == [0.0] * len(response.token_ids)


def test_a_response_stops_at_the_end_token_or_at_its_length(model: LlamaModel) -> None:
    for response in sampler(model).generate(requests(), params()):
        stopped = response.token_ids[-1] == END
        assert response.finish_reason == ("stop" if stopped else "length")
        assert stopped or len(response.token_ids) == 12
        assert END not in response.token_ids[:-1]


def test_a_response_ends_where_the_context_does(model: LlamaModel) -> None:
    def last(response: Response) -> tuple[int, str]:
        return 60 + len(response.token_ids), response.finish_reason

    (response,) = sampler(model).generate([Request(stream=3, token_ids=[5] * 60)], params(max_tokens=50))
    assert last(response) == (64, "length") or response.token_ids[-1] == END


@pytest.mark.parametrize("context", [29, 32, 33])
def test_a_smaller_context_changes_no_response_that_fits_it(model: LlamaModel, context: int) -> None:
    """17 tokens are the longest prompt, and 12 the longest response."""
    bounded = sampler(model, context=context).generate(requests(), params())
    assert bounded == sampler(model).generate(requests(), params())


def test_a_smaller_context_ends_a_response_and_refuses_a_prompt(model: LlamaModel) -> None:
    bounded, whole = sampler(model, context=20), sampler(model)
    (cut,), (full,) = (each.generate(requests()[2:3], params()) for each in (bounded, whole))
    assert (cut.token_ids, cut.finish_reason) == (full.token_ids[:3], "length")
    with pytest.raises(ValueError, match="a prompt of 20 tokens does not fit the context of 20 tokens"):
        bounded.generate([Request(stream=0, token_ids=[1] * 20)], params())


def test_pushed_weights_are_used_and_their_version_is_told(model: LlamaModel) -> None:
    other = LlamaModel(SHAPE)
    initialise(other, seed=1)
    used = sampler(model)
    before = used.generate(requests(), params())
    used.push(other.state_dict().items(), version=8)
    after = used.generate(requests(), params())
    assert {version for response in before for version in response.versions} == {7}
    assert {version for response in after for version in response.versions} == {8}
    assert [r.token_ids for r in after] == [
        r.token_ids for r in sampler(other).generate(requests(), params())
    ]


def drain(used: TorchSampler) -> dict[int, Response]:
    finished: dict[int, Response] = {}
    for _ in range(2 * 12 * len(PROMPTS)):
        finished |= dict(used.step())
    return finished


def test_requests_that_come_while_others_decode_get_the_same_responses(model: LlamaModel) -> None:
    together = sampler(model).generate(requests(), params())
    used = sampler(model, slots=3)
    finished: dict[int, Response] = {}
    for request in requests():
        used.submit(request, params())
        finished |= dict(used.step())
    finished |= drain(used)
    assert [finished[request.stream].token_ids for request in requests()] == [r.token_ids for r in together]


def test_weights_in_bf16_sample_as_the_same_numbers_in_float32(model: LlamaModel) -> None:
    """What a policy in bf16 publishes."""
    rounded = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    responses = []
    for weights in (rounded, {name: tensor.float() for name, tensor in rounded.items()}):
        made = TorchSampler(SHAPE, end_token_id=END, slots=8)
        made.push(weights.items(), version=1)
        responses.append(made.generate(requests(), params()))
    assert responses[0] == responses[1]


def test_weights_pushed_midway_serve_from_the_next_token_on(model: LlamaModel) -> None:
    other = LlamaModel(SHAPE)
    initialise(other, seed=1)
    used = sampler(model)
    request = Request(stream=3, token_ids=[5, 6])
    used.submit(request, params())
    assert used.step() == []  # two tokens
    used.push(other.state_dict().items(), version=8)
    response = drain(used)[3]
    (whole,) = sampler(model).generate([request], params())
    assert response.token_ids[:2] == whole.token_ids[:2]
    assert response.versions == [7, 7] + [8] * (len(response.token_ids) - 2)
    assert response.token_ids != whole.token_ids


def test_what_is_under_way_has_one_setting_and_streams_of_its_own(model: LlamaModel) -> None:
    used = sampler(model)
    used.submit(requests()[0], params())
    with pytest.raises(ValueError, match="stream 100 is under way already"):
        used.submit(requests()[0], params())
    with pytest.raises(ValueError, match="differ from"):
        used.submit(requests()[1], params(temperature=0.5))
    with pytest.raises(RuntimeError, match="under way"):
        used.generate([requests()[1]], params())
    used.abort()
    assert used.step() == []
    used.submit(requests()[0], params(temperature=0.5))


def test_a_tied_model_reads_its_embedding_as_the_output_layer() -> None:
    shape = ModelShape(
        **{name: getattr(SHAPE, name) for name in SHAPE.__slots__} | {"tie_word_embeddings": True}
    )
    model = LlamaModel(shape)
    initialise(model, seed=0)
    made = TorchSampler(shape, end_token_id=END, slots=2)
    made.push(model.state_dict().items(), version=0)
    response = made.generate([Request(stream=0, token_ids=[5])], params(temperature=0.0, max_tokens=4))[0]
    assert response.token_ids == whole_logits(model, [5, *response.token_ids]).argmax(-1)[:-1].tolist()


def test_no_request_gives_no_response(model: LlamaModel) -> None:
    assert sampler(model).generate([], params()) == []


@pytest.mark.parametrize("length", [0, 64])
def test_a_prompt_that_leaves_no_room_is_refused(model: LlamaModel, length: int) -> None:
    with pytest.raises(
        ValueError, match=rf"a prompt of {length} tokens does not fit the context of 64 tokens"
    ):
        sampler(model).generate([Request(stream=0, token_ids=[1] * length)], params())


@given(st.lists(st.floats(-8, 8), min_size=2, max_size=9), st.floats(0.05, 1.0))
def test_top_p_keeps_the_fewest_most_probable_tokens_that_reach_it(logits: list[float], top_p: float) -> None:
    row = torch.tensor([logits], dtype=torch.float64)
    full = row.softmax(-1)[0]
    kept = sampling_logprobs(row, temperature=1.0, top_p=top_p)[0].isfinite()
    mass = float(full[kept].sum())
    assert kept.any()
    assert mass >= top_p - 1e-9
    assert mass - float(full[kept].min()) < top_p + 1e-9
    assert bool((full[kept].min() >= full[~kept]).all())


def test_uniforms_are_uniform_and_their_neighbours_independent() -> None:
    streams, positions = np.meshgrid(np.arange(300, dtype=np.uint64), np.arange(300, dtype=np.uint64))
    draws = uniforms(3, streams.ravel(), positions.ravel()).reshape(300, 300)
    assert abs(draws.mean() - 0.5) < 0.005
    assert abs(np.corrcoef(draws[:-1].ravel(), draws[1:].ravel())[0, 1]) < 0.015
    assert abs(np.corrcoef(draws[:, :-1].ravel(), draws[:, 1:].ravel())[0, 1]) < 0.015
    counts, _ = np.histogram(draws, bins=10, range=(0, 1))
    assert counts.min() > 8600
    assert counts.max() < 9400


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda named: named.pop("model.norm.weight"), r"model\.norm\.weight is missing"),
        (
            lambda named: named.update({"model.norm.weight": torch.zeros(3)}),
            r"model\.norm\.weight is \(3,\), not ",
        ),
        (lambda named: named.update(another=torch.zeros(1)), "another is not a weight of this model"),
    ],
)
def test_weights_of_another_model_are_refused_and_leave_none(
    model: LlamaModel, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    used, named = sampler(model), dict(model.state_dict())
    change(named)
    with pytest.raises(ValueError, match=f"^pushed weights: {message}"):
        used.push(named.items(), version=8)
    with pytest.raises(RuntimeError, match="no weights yet"):
        used.generate([requests()[0]], params())
