"""vLLM against the plain model and the embedded sampler, with real engines: `make test-vllm`."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import json
import os
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rlef.config import ConfigError, ParallelConfig, VllmConfig
from rlef.job import join
from rlef.ports import UNFINISHED, Request, Response, SamplingParams
from rlef.pretrained import write_pretrained
from rlef.records import ModelShape
from rlef.torch_model import LlamaModel, initialise
from rlef.torch_sampler import TorchSampler, sampling_logprobs
from rlef.vllm_sampler import CPU_HEAD_SIZES, VllmSampler
from tests.distributed import common_folder, run_ranks
from tests.small_runs import Command, nothing_left_behind, read_lines, run_file

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None, reason="vllm is not installed here: make test-vllm"
    ),
]

END = 3
CONTEXT = 128
UNTIED = ModelShape(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=256,
    rope_theta=10000.0,
    rms_norm_eps=1e-6,
    tie_word_embeddings=False,
)
SHAPES = {"untied": UNTIED, "tied": dataclasses.replace(UNTIED, tie_word_embeddings=True)}
PROMPTS = ([5], [6, 7, 8], list(range(9, 49)), [4, 5], list(range(10, 80)))
LONG = ([5], [6, 7, 8])


@dataclass(frozen=True)
class Pair:
    """A sampler on vLLM, and the plain model whose weights it is given."""

    sampler: VllmSampler
    model: LlamaModel

    def push(self, *, seed: int, version: int = 7) -> None:
        """Other weights, for both."""
        randomise(self.model, seed)
        self.sampler.push(self.model.state_dict().items(), version)

    def assert_logprobs(
        self, prompts: list[list[int]], responses: list[Response], params: SamplingParams
    ) -> None:
        """They are the model's own, computed anew from the whole sequence, up to 1e-5."""
        for prompt, response in zip(prompts, responses, strict=True):
            logits = whole_logits(self.model, prompt + response.token_ids)[len(prompt) - 1 : -1]
            logprobs = sampling_logprobs(logits, temperature=params.temperature, top_p=params.top_p)
            expected = logprobs.gather(1, torch.tensor(response.token_ids)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(response.logprobs), expected, rtol=0, atol=1e-5)


def randomise(model: LlamaModel, seed: int) -> None:
    """Far from uniform, so that a wrong distribution shows."""
    initialise(model, seed=seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0) if parameter.dim() > 1 else parameter.fill_(1.0)


def whole_logits(model: LlamaModel, token_ids: list[int]) -> Tensor:
    with torch.no_grad():
        length = len(token_ids)
        logits: Tensor = model(
            torch.tensor(token_ids), torch.arange(length), torch.tensor([0, length], dtype=torch.int32)
        )
    return logits


def build(folder: Path, shape: ModelShape, **settings: float) -> Pair:
    model = LlamaModel(shape)
    initialise(model, seed=0)
    write_pretrained(folder, shape, model.state_dict(), end_token_id=END, pad_token_id=0)
    sampler = VllmSampler(
        folder,
        shape,
        end_token_id=END,
        context=CONTEXT,
        slots=64,
        dialogs=64,
        settings=VllmConfig(**settings),  # type: ignore[arg-type]
    )
    return Pair(sampler, model)


@pytest.fixture(scope="module", params=SHAPES)
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """One at a time: the tests of the tied model come after those of the untied one."""
    made = build(tmp_path_factory.mktemp("model"), SHAPES[request.param])
    with closing(made.sampler):
        with pytest.raises(RuntimeError, match=r"has no weights yet; push\(\) them first"):
            made.sampler.generate(requests(), params())
        yield made


@pytest.fixture
def pair(engine: Pair) -> Pair:
    engine.push(seed=1)
    return engine


def params(
    *, temperature: float = 1.0, top_p: float = 1.0, max_tokens: int = 24, seed: int = 1
) -> SamplingParams:
    return SamplingParams(temperature=temperature, top_p=top_p, max_tokens=max_tokens, seed=seed)


def requests(prompts: tuple[list[int], ...] = PROMPTS) -> list[Request]:
    return [Request(stream=100 + index, token_ids=ids) for index, ids in enumerate(prompts)]


def tokens(responses: list[Response]) -> list[list[int]]:
    return [response.token_ids for response in responses]


def test_greedy_decoding_gives_the_tokens_of_the_embedded_sampler(pair: Pair) -> None:
    embedded = TorchSampler(pair.model.shape, end_token_id=END, slots=8)
    embedded.push(pair.model.state_dict().items(), version=0)
    greedy = params(temperature=0.0)
    found, expected = pair.sampler.generate(requests(), greedy), embedded.generate(requests(), greedy)
    assert tokens(found) == tokens(expected)
    assert [response.logprobs for response in found] == [response.logprobs for response in expected]


def test_logprobs_are_the_models_own_after_each_push(pair: Pair) -> None:
    before: list[list[int]] = []
    for version in range(3):
        pair.push(seed=10 + version, version=version)
        responses = pair.sampler.generate(requests(), params())
        pair.assert_logprobs(list(PROMPTS), responses, params())
        assert {token for response in responses for token in response.versions} == {version}
        assert tokens(responses) != before
        before = tokens(responses)


def test_a_push_of_one_weight_that_changed_is_not_missed(pair: Pair) -> None:
    """Of each kind, as each has its own way into the engine."""
    layer = pair.model.model.layers[1]
    kinds = [pair.model.model.embed_tokens, pair.model.model.norm, layer.input_layernorm]
    kinds += [layer.self_attn.k_proj, layer.self_attn.o_proj, layer.mlp.up_proj, layer.mlp.down_proj]
    if not pair.model.shape.tie_word_embeddings:
        kinds.append(pair.model.lm_head)
    for kind in kinds:
        before = whole_logits(pair.model, PROMPTS[2])
        with torch.no_grad():
            kind.weight.mul_(torch.linspace(0.5, 1.5, kind.weight.shape[-1]))
        assert (whole_logits(pair.model, PROMPTS[2]) - before).abs().max() > 1e-3
        pair.sampler.push(pair.model.state_dict().items(), version=8)
        pair.assert_logprobs(list(PROMPTS), pair.sampler.generate(requests(), params()), params())


def test_pushed_weights_are_copies(pair: Pair) -> None:
    before = pair.sampler.generate(requests(), params())
    with torch.no_grad():
        for parameter in pair.model.parameters():
            parameter.zero_()
    assert pair.sampler.generate(requests(), params()) == before


@pytest.mark.parametrize(("temperature", "top_p"), [(0.7, 1.0), (1.0, 0.8), (0.2, 0.95), (1.5, 0.5)])
def test_logprobs_are_those_of_the_distribution_sampled_from(
    pair: Pair, temperature: float, top_p: float
) -> None:
    settings = params(temperature=temperature, top_p=top_p)
    pair.assert_logprobs(list(PROMPTS), pair.sampler.generate(requests(), settings), settings)


def test_tokens_are_as_frequent_as_they_are_probable(pair: Pair) -> None:
    draws = 4000
    many = [Request(stream=stream, token_ids=[5, 6]) for stream in range(draws)]
    responses = pair.sampler.generate(many, params(max_tokens=1))
    counts = torch.bincount(torch.tensor(tokens(responses))[:, 0], minlength=UNTIED.vocab_size)
    probabilities = whole_logits(pair.model, [5, 6])[-1].softmax(-1)
    deviation = (counts - draws * probabilities) / (draws * probabilities * (1 - probabilities)).sqrt()
    likely = draws * probabilities > 5
    assert int(likely.sum()) > 20
    assert float(deviation[likely].abs().max()) < 5


def test_a_response_does_not_depend_on_its_neighbours(pair: Pair) -> None:
    together = pair.sampler.generate(requests(), params())
    alone = [pair.sampler.generate([request], params())[0] for request in requests()]
    assert tokens(together) == tokens(alone)
    crowd = [Request(stream=stream, token_ids=[7, stream % 90]) for stream in range(40)]
    crowded = pair.sampler.generate([*crowd[:20], *requests(), *crowd[20:]], params())
    assert tokens(crowded[20:25]) == tokens(together)


def test_another_seed_stream_or_start_draws_other_numbers(pair: Pair) -> None:
    with torch.no_grad():
        for parameter in pair.model.parameters():
            parameter.zero_()  # all tokens are equally probable, whatever stands before them
    pair.sampler.push(pair.model.state_dict().items(), version=8)
    seven = Request(stream=7, token_ids=[5])
    base = tokens(pair.sampler.generate([seven], params()))
    assert tokens(pair.sampler.generate([seven], params())) == base
    assert tokens(pair.sampler.generate([seven], params(seed=2))) != base
    assert tokens(pair.sampler.generate([Request(stream=8, token_ids=[5])], params())) != base
    assert tokens(pair.sampler.generate([Request(stream=7, token_ids=[5, 5])], params())) != base


def test_a_later_turn_takes_the_earlier_ones_from_the_cache_and_gives_the_same(pair: Pair) -> None:
    prompt = list(range(10, 60))
    (first,) = pair.sampler.generate([Request(stream=1, token_ids=prompt)], params(max_tokens=20))
    dialog = [*prompt, *first.token_ids, END, 8, 9]
    before = pair.sampler.cached_prompt_tokens
    (cached,) = pair.sampler.generate([Request(stream=1, token_ids=dialog)], params())
    assert pair.sampler.cached_prompt_tokens - before >= 32  # whole blocks
    pair.assert_logprobs([dialog], [cached], params())
    pair.sampler.push(pair.model.state_dict().items(), version=8)  # the same weights, and an empty cache
    before = pair.sampler.cached_prompt_tokens
    (anew,) = pair.sampler.generate([Request(stream=1, token_ids=dialog)], params())
    assert pair.sampler.cached_prompt_tokens == before
    assert anew.token_ids == cached.token_ids


def test_a_push_drops_the_cache_of_the_weights_before(pair: Pair) -> None:
    dialog = [list(range(10, 80))]
    pair.sampler.generate(requests((dialog[0],)), params())
    pair.push(seed=2)
    before = pair.sampler.cached_prompt_tokens
    responses = pair.sampler.generate(requests((dialog[0],)), params())
    assert pair.sampler.cached_prompt_tokens == before
    pair.assert_logprobs(dialog, responses, params())


def test_prompts_that_do_not_fit_one_step_are_read_in_several(pair: Pair) -> None:
    """64 of 96 tokens; vLLM's CPU build fails where a step ends within a prompt that has a seed."""
    prompts = [[stream, *range(95)] for stream in range(64)]
    crowd = [Request(stream=stream, token_ids=ids) for stream, ids in enumerate(prompts)]
    responses = pair.sampler.generate(crowd, params(max_tokens=4))
    pair.assert_logprobs(prompts, responses, params())
    assert tokens(pair.sampler.generate(crowd[60:], params(max_tokens=4))) == tokens(responses)[60:]


def test_a_response_stops_at_the_end_token_or_at_its_length(pair: Pair) -> None:
    many = [Request(stream=stream, token_ids=[5, stream % 90]) for stream in range(64)]
    responses = pair.sampler.generate(many, params(max_tokens=40))
    assert {response.finish_reason for response in responses} == {"stop", "length"}
    for response in responses:
        stopped = response.token_ids[-1] == END
        assert response.finish_reason == ("stop" if stopped else "length")
        assert stopped or len(response.token_ids) == 40
        assert END not in response.token_ids[:-1]
        assert len(response.logprobs) == len(response.token_ids)


def test_a_response_ends_where_the_context_does(pair: Pair) -> None:
    many = [Request(stream=stream, token_ids=[5] * (CONTEXT - 4)) for stream in range(8)]
    responses = pair.sampler.generate(many, params(max_tokens=50))
    assert {len(response.token_ids) for response in responses if response.finish_reason == "length"} == {4}


@pytest.mark.parametrize("length", [0, CONTEXT])
def test_a_prompt_that_leaves_no_room_is_refused(pair: Pair, length: int) -> None:
    with pytest.raises(
        ValueError, match=rf"a prompt of {length} tokens does not fit the context of {CONTEXT} tokens"
    ):
        pair.sampler.generate([Request(stream=0, token_ids=[1] * length)], params())


def test_a_temperature_that_vllm_would_raise_is_refused(pair: Pair) -> None:
    with pytest.raises(ValueError, match=r"temperature 0\.001 is too low for vLLM: use 0 or at least 0\.01"):
        pair.sampler.generate(requests(), params(temperature=0.001))


def test_no_request_gives_no_response(pair: Pair) -> None:
    assert pair.sampler.generate([], params()) == []


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("model.norm.weight", None, "model.norm.weight is missing"),
        ("model.norm.weight", torch.ones(3), r"model.norm.weight is \(3,\), not \(64,\)"),
        ("model.extra", torch.ones(3), "model.extra is not a weight of this model, or came twice"),
    ],
)
def test_weights_of_another_model_are_refused_and_the_next_push_mends_it(
    pair: Pair, name: str, change: Tensor | None, message: str
) -> None:
    wrong = dict(pair.model.state_dict())
    del wrong["model.norm.weight"]
    if name != "model.norm.weight":
        wrong["model.norm.weight"] = pair.model.model.norm.weight
    read: list[str] = []

    def named() -> Iterator[tuple[str, Tensor]]:
        if change is not None:
            yield name, change
        for other, tensor in wrong.items():
            read.append(other)
            yield other, tensor

    with pytest.raises(ValueError, match=message):
        pair.sampler.push(named(), version=9)
    assert read == list(wrong)  # to the end: a collective waits for all
    with pytest.raises(RuntimeError, match="has no weights yet"):
        pair.sampler.generate(requests(), params())
    pair.push(seed=3)
    pair.assert_logprobs(list(PROMPTS), pair.sampler.generate(requests(), params()), params())


def test_a_push_within_responses_changes_the_weights_from_the_next_token_on(pair: Pair) -> None:
    finished = push_within_responses(pair)
    assert all(len(response.token_ids) > 8 for response in finished.values())


def push_within_responses(pair: Pair) -> dict[int, Response]:
    """After eight tokens; checked against the model's log-probabilities before and after."""
    begun: dict[int, list[int]] = {}
    for request in requests(LONG):
        pair.sampler.submit(request, params(max_tokens=30))
        begun[request.stream] = list(request.token_ids)
    for _ in range(8):
        assert pair.sampler.step() == []
    old = whole_logprobs(pair.model)
    pair.push(seed=2, version=8)
    new = whole_logprobs(pair.model)
    finished = to_the_end(pair.sampler)
    assert finished.keys() == begun.keys()
    for stream, response in finished.items():
        assert response.versions == [7] * 8 + [8] * (len(response.token_ids) - 8)
        ids = begun[stream] + response.token_ids
        expected = torch.cat([old(ids)[: len(begun[stream]) + 7], new(ids)[len(begun[stream]) + 7 :]])
        found = torch.tensor(response.logprobs)
        torch.testing.assert_close(found, expected[len(begun[stream]) - 1 :], rtol=0, atol=1e-5)
    return finished


def whole_logprobs(model: LlamaModel) -> Callable[[list[int]], Tensor]:
    """Of each token but the first, by the weights that the model has now."""
    kept = copy.deepcopy(model)

    def logprobs(token_ids: list[int]) -> Tensor:
        every = whole_logits(kept, token_ids)[:-1].log_softmax(-1)
        return every.gather(1, torch.tensor(token_ids[1:])[:, None])[:, 0]

    return logprobs


def to_the_end(sampler: VllmSampler) -> dict[int, Response]:
    finished: dict[int, Response] = {}
    for _ in range(CONTEXT):
        finished |= dict(sampler.step())
    return finished


def test_an_aborted_response_keeps_what_it_has_and_can_be_gone_on_with(pair: Pair) -> None:
    whole = pair.sampler.generate(requests(LONG), params(max_tokens=30))
    for request in requests(LONG):
        pair.sampler.submit(request, params(max_tokens=30))
    for _ in range(5):
        pair.sampler.step()
    aborted = dict(pair.sampler.abort())
    assert [aborted[100 + index].token_ids for index in range(2)] == [ids[:5] for ids in tokens(whole)]
    assert {response.finish_reason for response in aborted.values()} == {UNFINISHED}
    assert pair.sampler.abort() == pair.sampler.step() == []
    for request in requests(LONG):
        ids = [*request.token_ids, *aborted[request.stream].token_ids]
        pair.sampler.submit(
            Request(stream=request.stream, token_ids=ids, num_sampled=5), params(max_tokens=30)
        )
    finished = to_the_end(pair.sampler)
    for request in requests(LONG):
        ids = [*request.token_ids, *aborted[request.stream].token_ids]
        pair.assert_logprobs([ids], [finished[request.stream]], params())
    assert {len(response.token_ids) for response in finished.values()} >= {25}
    assert pair.sampler.generate(requests(LONG), params(max_tokens=30)) == whole


def test_a_response_can_be_submitted_while_others_are_under_way(pair: Pair) -> None:
    alone = [pair.sampler.generate([request], params())[0].token_ids for request in requests()]
    finished: dict[int, Response] = {}
    for request in requests():
        pair.sampler.submit(request, params())
        finished |= dict(pair.sampler.step())
    finished |= to_the_end(pair.sampler)
    assert [finished[request.stream].token_ids for request in requests()] == alone


def test_a_stream_that_is_under_way_is_refused_and_so_is_generate(pair: Pair) -> None:
    pair.sampler.submit(requests()[0], params())
    with pytest.raises(ValueError, match="stream 100 is under way already; give each request its own"):
        pair.sampler.submit(requests()[0], params())
    with pytest.raises(RuntimeError, match=r"responses are under way; take them by step\(\), or abort\(\)"):
        pair.sampler.generate(requests(), params())
    pair.sampler.abort()


def test_torch_still_listens_to_set_num_threads(pair: Pair) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    assert torch.get_num_threads() == before + 1
    torch.set_num_threads(before)


def test_the_head_sizes_are_those_that_vllms_attention_knows() -> None:
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    assert list(CPU_HEAD_SIZES) == CPUAttentionBackend.get_supported_head_sizes()


def test_a_cache_that_is_too_small_for_all_makes_some_wait_and_changes_nothing(tmp_path: Path) -> None:
    """A response that must give up its place for others starts again, with what it has drawn."""
    block = 32 * 2 * 2 * 2 * 32 * 4  # tokens, keys and values, layers, heads, channels, bytes
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    many = [Request(stream=stream, token_ids=[5, stream]) for stream in range(16)]
    expected: list[list[int]] = []
    for blocks in (12, 200):
        pair = build(tmp_path, UNTIED, memory_fraction=(blocks + 0.5) * block / memory)
        with closing(pair.sampler):
            pair.push(seed=1)
            responses = pair.sampler.generate(many, params(max_tokens=100))
        assert expected in ([], tokens(responses))
        expected = tokens(responses)
    assert sum(len(ids) for ids in expected) > 12 * 32  # more than the smaller one holds


def test_a_cache_that_is_too_small_for_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"vllm\.memory_fraction = 1e-07 leaves [\d,]+ bytes for the cache"):
        build(tmp_path, UNTIED, memory_fraction=1e-7)


def test_two_workers_of_tensor_parallel_give_the_models_logprobs_after_each_push(tmp_path: Path) -> None:
    pair = build(tmp_path, SHAPES["tied"], tensor_parallel=2)
    with closing(pair.sampler):
        for seed in (1, 2):
            pair.push(seed=seed)
            pair.assert_logprobs(list(PROMPTS), pair.sampler.generate(requests(), params()), params())


def as_rank_of_an_engine() -> list[list[Response]]:
    """One of two processes that have an engine together: what it gave, before, during and after a push."""
    join(ParallelConfig(processes=2))  # a default group of both
    own = common_folder() / f"model-{os.environ['RANK']}"
    own.mkdir()
    pair = build(own, SHAPES[(common_folder() / "shape").read_text()], tensor_parallel=2)
    with closing(pair.sampler):
        assert not pair.sampler._has_workers
        pair.push(seed=1)
        embedded = TorchSampler(pair.model.shape, end_token_id=END, slots=8)
        embedded.push(pair.model.state_dict().items(), version=0)
        greedy = params(temperature=0.0)
        found = pair.sampler.generate(requests(), greedy)
        assert tokens(found) == tokens(embedded.generate(requests(), greedy))
        drawn = pair.sampler.generate(requests(), params())
        pair.assert_logprobs(list(PROMPTS), drawn, params())
        pushed = list(push_within_responses(pair).values())
        begun = params(max_tokens=30)
        for request in requests(LONG):
            pair.sampler.submit(request, begun)
        for _ in range(5):
            pair.sampler.step()
        aborted = dict(pair.sampler.abort())
        assert {len(response.token_ids) for response in aborted.values()} == {5}
        whole = pair.sampler.generate(requests(LONG), begun)
        assert [aborted[100 + index].token_ids for index in range(2)] == [ids[:5] for ids in tokens(whole)]
        for request in requests(LONG):
            ids = [*request.token_ids, *aborted[request.stream].token_ids]
            pair.sampler.submit(Request(stream=request.stream, token_ids=ids, num_sampled=5), begun)
        gone_on_with = to_the_end(pair.sampler)
        for request in requests(LONG):
            ids = [*request.token_ids, *aborted[request.stream].token_ids]
            pair.assert_logprobs([ids], [gone_on_with[request.stream]], params())
    return [found, drawn, pushed, whole, list(gone_on_with.values())]


@pytest.mark.parametrize("shape", SHAPES)
def test_two_processes_of_one_engine_give_the_models_logprobs_and_the_same_tokens(
    tmp_path: Path, shape: str
) -> None:
    """Greedy tokens are the embedded sampler's, and a push within responses serves from the next token on."""
    (tmp_path / "shape").write_text(shape)
    first, second = run_ranks(as_rank_of_an_engine, ranks=2, folder=tmp_path, timeout_s=1200)
    assert [tokens(responses) for responses in first] == [tokens(responses) for responses in second]
    assert all(first)


@pytest.mark.parametrize(
    ("processes", "overrides"),
    [
        (1, []),
        (2, []),
        (1, ["rollout.overlap=true"]),
        (1, ["rollout.max_staleness=1"]),
        (2, ["parallel.sampling_processes=1"]),
        (3, ["parallel.sampling_processes=2", "vllm.tensor_parallel=2"]),
        (3, ["parallel.sampling_processes=2", "vllm.tensor_parallel=2", "rollout.max_staleness=1"]),
    ],
    ids=[
        "lockstep",
        "two processes",
        "overlapped",
        "asynchronous",
        "one samples and one learns",
        "two of one engine sample",
        "two of one engine sample while one learns",
    ],
)
def test_a_run_with_vllm_trains_the_embedded_model(
    tmp_path: Path, processes: int, overrides: list[str]
) -> None:
    """What vLLM says of its tokens is what the network says of them, also after a step that moved it."""
    settings = run_file(tmp_path)
    common = ["rollout.sampler=vllm", f"parallel.processes={processes}", "ppo.updates_per_step=1"]
    with nothing_left_behind():
        command = Command(["rlef", "train", str(settings), *common, *overrides], tmp_path / "log")
        assert command.wait() == 0, command.output
    first, second = read_lines(tmp_path / "small" / "metrics.jsonl")
    assert (first["step"], second["step"]) == (1, 2)
    assert first["kl"] == 0 != second["kl"]
    if "rollout.max_staleness=1" not in overrides:  # whose tokens are those of older weights
        for line in (first, second):
            assert abs(line["policy/behaviour_weight"] - 1) < 1e-5
    summary = json.loads((tmp_path / "small" / "summary.json").read_text())
    assert summary["final"] is not None
