"""The embedded sampler: batched decoding with a KV cache, in plain torch, of the policy's own weights.

Requests wait in a queue for one of `slots` rows of the cache. A row is filled by one forward pass over its
prompt, then grows by one token a step together with all other rows; when it finishes, the last row moves into
its place, so that the rows in use are always the first ones and no step pays for empty slots.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from rlef.ports import UNFINISHED, Draft, Request, Response, SamplingParams, generate_by_steps
from rlef.records import ModelShape
from rlef.torch_model import rotary_tables, rotate

_EMBEDDING, _OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
_CACHE_GRANULE = 32  # attended lengths are rounded up to it


def _in_granules(length: int) -> int:
    return -(-length // _CACHE_GRANULE) * _CACHE_GRANULE


def uniforms(seed: int, streams: NDArray[np.uint64], positions: NDArray[np.uint64]) -> NDArray[np.float64]:
    """One number in [0, 1) for each (seed, stream, position): a hash, so it needs no state. All `[rows]`."""
    mixed = _splitmix64(np.uint64(seed) + np.zeros_like(streams))
    mixed = _splitmix64(mixed ^ _splitmix64(streams + np.uint64(0x5851F42D4C957F2D)))
    mixed = _splitmix64(mixed ^ _splitmix64(positions + np.uint64(0x14057B7EF767814F)))
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _splitmix64(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is the point
        state = state + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return state ^ (state >> np.uint64(31))


def sampling_logprobs(logits: Tensor, *, temperature: float, top_p: float) -> Tensor:
    """Log-probs `[rows, vocab]` of the distribution that is sampled from: after temperature and top-p.

    Top-p keeps the most probable tokens until their mass reaches `top_p`, at least one; the others get -inf.
    Temperature 0 puts all mass on the most probable token.
    """
    if temperature == 0:
        greedy = torch.full_like(logits, -torch.inf)
        return greedy.scatter_(1, logits.argmax(-1, keepdim=True), 0.0)
    logprobs = (logits / temperature).log_softmax(-1)
    if top_p == 1:
        return logprobs
    ordered, order = logprobs.sort(dim=-1, descending=True, stable=True)
    mass_before = ordered.exp().cumsum(-1) - ordered.exp()
    kept = torch.zeros_like(logprobs, dtype=torch.bool).scatter_(1, order, mass_before < top_p)
    return logprobs.masked_fill(~kept, -torch.inf).log_softmax(-1)


@dataclass(frozen=True, slots=True)
class _LayerWeights:
    input_norm: Tensor  # [hidden]
    query_key_value: Tensor  # [(heads + 2 key_value_heads) * head_dim, hidden]
    query_key_value_bias: Tensor | None  # [(heads + 2 key_value_heads) * head_dim], of Qwen2
    query_norm: Tensor | None  # [head_dim], of Qwen3
    key_norm: Tensor | None  # [head_dim], of Qwen3
    attention_output: Tensor  # [hidden, heads * head_dim]
    feed_forward_norm: Tensor  # [hidden]
    gate_up: Tensor  # [2 * intermediate, hidden]
    down: Tensor  # [hidden, intermediate]


class TorchSampler:
    """`ports.StreamingSampler` for a model of any size that fits in this process's memory.

    No dialog grows beyond `context` tokens: the model's own bound, if left out. The cache has `slots` rows of
    so many.
    """

    def __init__(
        self,
        shape: ModelShape,
        *,
        end_token_id: int,
        slots: int,
        context: int | None = None,
        device: torch.device | None = None,
    ) -> None:
        self._device = device or torch.device("cpu")
        self._shape = shape
        self._end_token_id = end_token_id
        self._slots = slots
        self._context = context or shape.max_position_embeddings
        self._version = -1
        self._waiting: deque[Draft] = deque()
        self._active: list[Draft] = []  # in the order of the cache's rows
        self._streams: set[int] = set()  # of what waits or is active
        self._params: SamplingParams | None = None  # of what is under way
        cache_shape = (slots, shape.num_key_value_heads, _in_granules(self._context), shape.head_dim)
        self._keys = [torch.zeros(cache_shape, device=self._device) for _ in range(shape.num_hidden_layers)]
        self._values = [torch.zeros(cache_shape, device=self._device) for _ in range(shape.num_hidden_layers)]
        cosine, sine = rotary_tables(shape, self._context)
        self._cosine, self._sine = cosine.to(self._device), sine.to(self._device)
        self._places: dict[str, Tensor] = {}  # by Hugging Face name, where each weight is kept
        hidden = (shape.hidden_size,)
        self._embedding = self._room({_EMBEDDING: (shape.vocab_size, *hidden)})  # [vocab, hidden]
        self._layers = [self._room_for_layer(index) for index in range(shape.num_hidden_layers)]
        self._final_norm = self._room({"model.norm.weight": hidden})
        self._output = self._embedding  # [vocab, hidden]
        if not shape.tie_word_embeddings:
            self._output = self._room({_OUTPUT: (shape.vocab_size, *hidden)})

    def _room(self, parts: dict[str, tuple[int, ...]]) -> Tensor:
        """For weights of these names and shapes, one below the other."""
        rows = [size[0] for size in parts.values()]
        (rest,) = {size[1:] for size in parts.values()}
        whole = torch.empty((sum(rows), *rest), device=self._device)
        self._places |= dict(zip(parts, torch.split(whole, rows), strict=True))
        return whole

    def _room_for_layer(self, index: int) -> _LayerWeights:
        shape = self._shape
        hidden, head_dim, inner = shape.hidden_size, shape.head_dim, shape.intermediate_size
        queries, groups = shape.num_attention_heads * head_dim, shape.num_key_value_heads * head_dim

        def room(parts: dict[str, tuple[int, ...]]) -> Tensor:
            return self._room({f"model.layers.{index}.{name}": size for name, size in parts.items()})

        rows = {"q": queries, "k": groups, "v": groups}
        return _LayerWeights(
            input_norm=room({"input_layernorm.weight": (hidden,)}),
            query_key_value=room(
                {f"self_attn.{name}_proj.weight": (size, hidden) for name, size in rows.items()}
            ),
            query_key_value_bias=(
                room({f"self_attn.{name}_proj.bias": (size,) for name, size in rows.items()})
                if shape.query_key_value_bias
                else None
            ),
            query_norm=room({"self_attn.q_norm.weight": (head_dim,)}) if shape.query_key_norm else None,
            key_norm=room({"self_attn.k_norm.weight": (head_dim,)}) if shape.query_key_norm else None,
            attention_output=room({"self_attn.o_proj.weight": (hidden, queries)}),
            feed_forward_norm=room({"post_attention_layernorm.weight": (hidden,)}),
            gate_up=room({f"mlp.{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}),
            down=room({"mlp.down_proj.weight": (hidden, inner)}),
        )

    def push(self, named_weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """As in `ports.Sampler`. Each tensor is copied over the one before it, so that no more than the model
        and what arrives is held.

        Raises:
            ValueError: not the weights of a model of this shape. The sampler has none then.
        """
        self._version = -1
        missing, fault = dict(self._places), ""
        for name, tensor in named_weights:  # to the end, whatever is wrong: other ranks take part in it
            if name == _OUTPUT and self._shape.tie_word_embeddings:
                continue  # some checkpoints hold the embedding twice
            place = missing.pop(name, None)
            if place is not None and place.shape == tensor.shape:
                place.copy_(tensor.detach())
            elif place is None:
                fault = fault or f"{name} is not a weight of this model, or came twice"
            else:
                fault = fault or f"{name} is {tuple(tensor.shape)}, not {tuple(place.shape)}"
        if missing and not fault:
            fault = f"{min(missing)} is missing"
        if fault:
            raise ValueError(f"pushed weights: {fault}; push those of the model that the sampler has")
        self._version = version

    def generate(self, requests: Sequence[Request], params: SamplingParams) -> list[Response]:
        if self._streams:
            raise RuntimeError("responses are under way; take them by step(), or abort() them")
        return generate_by_steps(self, requests, params)

    def submit(self, request: Request, params: SamplingParams) -> None:
        if self._version < 0:
            raise RuntimeError("the sampler has no weights yet; push() them first")
        self._check(request)
        if request.stream in self._streams:
            raise ValueError(f"stream {request.stream} is under way already; give each request its own")
        if self._streams and params != self._params:
            raise ValueError(f"{params} differ from the {self._params} under way; wait until those are done")
        self._params = params
        self._streams.add(request.stream)
        self._waiting.append(Draft(request))

    @torch.inference_mode()
    def step(self) -> list[tuple[int, Response]]:
        """Fill free rows of the cache, then one token more for every row."""
        if not self._streams:
            return []
        assert self._params is not None
        active = self._active
        fresh = [self._waiting.popleft() for _ in range(min(len(self._waiting), self._slots - len(active)))]
        if fresh:
            self._choose(fresh, self._prefill(fresh, first_row=len(active)), self._params)
            active += fresh
        finished = self._retire(active)
        if active:
            self._choose(active, self._decode(active), self._params)
            finished += self._retire(active)
        self._streams -= {row.request.stream for row in finished}
        return [(row.request.stream, row.response()) for row in finished]

    def abort(self) -> list[tuple[int, Response]]:
        begun = [(row.request.stream, row.response()) for row in (*self._active, *self._waiting)]
        self._waiting.clear()
        self._active.clear()
        self._streams.clear()
        return begun

    def close(self) -> None:
        self._keys, self._values = [], []

    def _check(self, request: Request) -> None:
        context = self._context
        if not 0 < len(request.token_ids) < context:
            raise ValueError(
                f"a prompt of {len(request.token_ids)} tokens does not fit the context of {context} tokens "
                "with room for a response; lower rollout.max_prompt_tokens, max_feedback_tokens or turns"
            )

    def _prefill(self, rows: list[Draft], *, first_row: int) -> Tensor:
        """Fill the cache with the prompts; logits of each prompt's last token, `[rows, vocab]`."""
        lengths = torch.tensor([len(row.request.token_ids) for row in rows])
        longest = int(lengths.max())
        token_ids = torch.zeros(len(rows), longest, dtype=torch.long)
        for index, row in enumerate(rows):
            token_ids[index, : len(row.request.token_ids)] = torch.as_tensor(row.request.token_ids)
        positions = torch.arange(longest).expand(len(rows), longest)
        hidden = self._forward(token_ids.to(self._device), positions.to(self._device), first_row, longest)
        last = (lengths - 1).to(self._device)
        return self._logits(hidden[torch.arange(len(rows), device=self._device), last])

    def _decode(self, rows: list[Draft]) -> Tensor:
        """One more token for every active row; logits `[rows, vocab]`."""
        token_ids = torch.tensor([[row.token_ids[-1]] for row in rows])
        positions = torch.tensor([[len(row.request.token_ids) + len(row.token_ids) - 1] for row in rows])
        attended = _in_granules(int(positions.max()) + 1)
        hidden = self._forward(token_ids.to(self._device), positions.to(self._device), 0, attended)
        return self._logits(hidden[:, 0])

    def _forward(self, token_ids: Tensor, positions: Tensor, first_row: int, attended: int) -> Tensor:
        """Hidden states `[rows, length, hidden]`; writes the cache, attends to its first `attended`
        positions."""
        shape = self._shape
        rows, length = token_ids.shape
        heads, groups, head_dim = shape.num_attention_heads, shape.num_key_value_heads, shape.head_dim
        cosine = self._cosine[positions][:, None]  # [rows, 1, length, head_dim]
        sine = self._sine[positions][:, None]
        reach = torch.arange(attended, device=self._device)
        visible = reach <= positions[:, None, :, None]  # [rows, 1, length, attended]
        target = positions[:, None, :, None].expand(rows, groups, length, head_dim)
        hidden = functional.embedding(token_ids, self._embedding)
        for weights, all_keys, all_values in zip(self._layers, self._keys, self._values, strict=True):
            keys, values = all_keys[first_row : first_row + rows], all_values[first_row : first_row + rows]
            normed = functional.rms_norm(hidden, (shape.hidden_size,), weights.input_norm, shape.rms_norm_eps)
            mixed = (
                functional.linear(normed, weights.query_key_value, weights.query_key_value_bias)
                .view(rows, length, -1, head_dim)
                .transpose(1, 2)
            )
            # [rows, heads, length, head_dim], and twice [rows, groups, length, head_dim]
            query, key, value = torch.split(mixed, [heads, groups, groups], dim=1)
            if weights.query_norm is not None:
                query = functional.rms_norm(query, (head_dim,), weights.query_norm, shape.rms_norm_eps)
                key = functional.rms_norm(key, (head_dim,), weights.key_norm, shape.rms_norm_eps)
            query, key = rotate(query, cosine, sine), rotate(key, cosine, sine)
            keys.scatter_(2, target, key)
            values.scatter_(2, target, value)
            if length == 1:  # a group's heads share keys: fold them into the query length
                query = query.reshape(rows, groups, heads // groups, head_dim)
                mask = visible.expand(rows, 1, heads // groups, attended)
            else:
                mask = visible
            output = functional.scaled_dot_product_attention(
                query, keys[:, :, :attended], values[:, :, :attended], attn_mask=mask, enable_gqa=length > 1
            )
            output = output.reshape(rows, heads, length, head_dim).transpose(1, 2).flatten(-2)
            hidden = hidden + functional.linear(output, weights.attention_output)
            normed = functional.rms_norm(
                hidden, (shape.hidden_size,), weights.feed_forward_norm, shape.rms_norm_eps
            )
            gate, up = functional.linear(normed, weights.gate_up).chunk(2, dim=-1)
            hidden = hidden + functional.linear(functional.silu(gate) * up, weights.down)
        return hidden

    def _logits(self, hidden: Tensor) -> Tensor:
        shape = self._shape
        normed = functional.rms_norm(hidden, (shape.hidden_size,), self._final_norm, shape.rms_norm_eps)
        return functional.linear(normed, self._output).float()

    def _choose(self, rows: list[Draft], logits: Tensor, params: SamplingParams) -> None:
        """Append one token, sampled from `logits` `[rows, vocab]`, to every row: by inverse of the cumulative
        distribution."""
        logprobs = sampling_logprobs(logits, temperature=params.temperature, top_p=params.top_p)
        positions = [len(row.request.token_ids) + len(row.token_ids) for row in rows]
        draws = uniforms(
            params.seed,
            np.array([row.request.stream for row in rows], dtype=np.uint64),
            np.array(positions, dtype=np.uint64),
        )
        cumulative = logprobs.double().exp().cumsum(-1)
        total = cumulative[:, -1:]
        below_total = total.nextafter(torch.zeros_like(total))
        thresholds = (torch.from_numpy(draws).to(self._device)[:, None] * total).minimum(below_total)
        chosen = torch.searchsorted(cumulative, thresholds, right=True)  # [rows, 1]
        chosen_logprobs = logprobs.gather(1, chosen)[:, 0].tolist()
        for row, token_id, logprob, position in zip(
            rows, chosen[:, 0].tolist(), chosen_logprobs, positions, strict=True
        ):
            row.token_ids.append(token_id)
            row.logprobs.append(logprob)
            row.versions.append(self._version)
            if token_id == self._end_token_id:
                row.finish_reason = "stop"
            elif (
                row.request.num_sampled + len(row.token_ids) == params.max_tokens
                or position + 1 == self._context
            ):
                row.finish_reason = "length"

    def _retire(self, active: list[Draft]) -> list[Draft]:
        """Take finished rows out of `active`, and keep the cache's used rows together at the front."""
        retired = [row for row in active if row.finish_reason != UNFINISHED]
        for row in retired:
            hole, last = active.index(row), len(active) - 1
            if hole != last:
                used = len(active[last].request.token_ids) + len(active[last].token_ids)
                for cache in (*self._keys, *self._values):
                    cache[hole, :, :used] = cache[last, :, :used]
                active[hole] = active[last]
            active.pop()
        return retired
