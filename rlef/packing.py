"""Episodes to packed variable-length batches, and the arithmetic of who takes which episodes."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from itertools import accumulate

import torch

from rlef.config import ValueLevel
from rlef.records import Batch, Episode


def pack(episodes: Sequence[Episode], *, value_level: ValueLevel) -> Batch:
    """Lay `episodes` end to end, in order. Nothing is padded, and each keeps its own positions from 0.

    At turn level the value network is read once per turn, at the last token of the turn's prompt, and all
    tokens of the response take that advantage (RLEF, section 2). At token level, the ablation, it is read
    once per response token, at the token before it.

    Raises:
        ValueError: no episodes, an episode without turns or rewards, turns that overlap or lie outside the
            episode, a response with nothing before it, or `sampled` marks that do not match the turns.
    """
    if not episodes:
        raise ValueError("there are no episodes to pack; give at least one")
    for episode in episodes:
        _check(episode)
    offsets = [0, *accumulate(len(episode.token_ids) for episode in episodes)]
    responses = [  # (sequence, packed index of the first token, one past the last), one per turn
        (sequence, offset + turn.start, offset + turn.end)
        for sequence, (episode, offset) in enumerate(zip(episodes, offsets, strict=False))
        for turn in episode.turns
    ]
    starts = torch.tensor([start for _, start, _ in responses])  # [turns]
    counts = torch.tensor([end - start for _, start, end in responses])  # [turns]
    response_turns = torch.arange(len(responses)).repeat_interleave(counts)  # [response tokens]
    response_mask = torch.tensor([sampled for episode in episodes for sampled in episode.sampled])
    token_turns = torch.full((offsets[-1],), -1)
    token_turns[response_mask] = response_turns
    if value_level == "turn":
        token_values, value_positions, value_turns = (
            token_turns.clone(),
            starts - 1,
            torch.arange(len(responses)),
        )
    else:
        token_values = torch.full((offsets[-1],), -1)
        token_values[response_mask] = torch.arange(response_turns.shape[0])
        value_positions, value_turns = response_mask.nonzero()[:, 0] - 1, response_turns
    logprobs = torch.tensor(
        [logprob for episode in episodes for logprob in episode.logprobs], dtype=torch.float32
    )
    return Batch(
        token_ids=torch.tensor([token for episode in episodes for token in episode.token_ids]),
        position_ids=torch.cat([torch.arange(len(episode.token_ids)) for episode in episodes]),
        cu_seqlens=torch.tensor(offsets, dtype=torch.int32),
        response_mask=response_mask,
        behaviour_logprobs=torch.where(response_mask, logprobs, 0.0),
        token_turns=token_turns,
        token_values=token_values,
        value_positions=value_positions,
        value_turns=value_turns,
        turn_rewards=torch.tensor([reward for episode in episodes for reward in episode.rewards]),
        turn_sequences=torch.tensor([sequence for sequence, _, _ in responses]),
    )


def split_micro_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Divide sequences of these lengths into micro-batches of at most `max_tokens`, as equal as possible.

    As few micro-batches as this greedy division needs; a sequence longer than the budget gets one of its own.
    The same lengths always give the same division. Each index of `lengths` appears once; indices ascend
    within a micro-batch, and micro-batches are in the order of their first index.

    Raises:
        ValueError: a length or budget below 1.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}; it must be at least 1")
    _check_lengths(lengths)
    long = [index for index, length in enumerate(lengths) if length > max_tokens]
    short = [index for index, length in enumerate(lengths) if length <= max_tokens]
    bins = -(-sum(lengths[index] for index in short) // max_tokens)
    while True:
        groups = _divide(short, lengths, bins)
        if all(sum(lengths[index] for index in group) <= max_tokens for group in groups):
            return sorted([[index] for index in long] + [group for group in groups if group])
        bins += 1


def assign_to_ranks(lengths: Sequence[int], ranks: int) -> list[list[int]]:
    """Divide sequences of these lengths among `ranks` processes, as equal in tokens as possible.

    The same lengths always give the same division. Each index appears once, ascending within a rank; a rank
    gets none only if there are fewer sequences than ranks.

    Raises:
        ValueError: a length or number of ranks below 1.
    """
    if ranks < 1:
        raise ValueError(f"ranks is {ranks}; it must be at least 1")
    _check_lengths(lengths)
    return _divide(range(len(lengths)), lengths, ranks)


def _divide(indices: Sequence[int], lengths: Sequence[int], bins: int) -> list[list[int]]:
    """The longest first, each to the bin that has least so far."""
    groups: list[list[int]] = [[] for _ in range(bins)]
    heap = [(0, number) for number in range(bins)]
    for index in sorted(indices, key=lambda index: (-lengths[index], index)):
        tokens, number = heap[0]
        groups[number].append(index)
        heapq.heapreplace(heap, (tokens + lengths[index], number))
    return [sorted(group) for group in groups]


def _check_lengths(lengths: Sequence[int]) -> None:
    for index, length in enumerate(lengths):
        if length < 1:
            raise ValueError(f"sequence {index} has length {length}; it must be at least 1")


def _check(episode: Episode) -> None:
    name = f"episode {episode.number} of {episode.problem_id}"
    tokens = len(episode.token_ids)
    if not len(episode.sampled) == len(episode.logprobs) == tokens:
        raise ValueError(
            f"{name} has {tokens} token_ids, {len(episode.sampled)} sampled and {len(episode.logprobs)} "
            "logprobs; make them equal"
        )
    if not episode.turns:
        raise ValueError(f"{name} has no turn; drop it before packing")
    if len(episode.rewards) != len(episode.turns):
        raise ValueError(
            f"{name} has {len(episode.rewards)} rewards for {len(episode.turns)} turns; "
            "fill them by turn_rewards"
        )
    sampled = [False] * tokens
    end = 0
    for number, turn in enumerate(episode.turns):
        if turn.start == 0:
            raise ValueError(f"{name} starts with a response; put a prompt of at least one token before it")
        if not end <= turn.start < turn.end <= tokens:
            raise ValueError(
                f"{name}, turn {number}, spans {turn.start} to {turn.end}; "
                f"it must be a non-empty span between {end} and {tokens}"
            )
        end = turn.end
        sampled[turn.start : turn.end] = [True] * (turn.end - turn.start)
    if sampled != episode.sampled:
        raise ValueError(
            f"{name} marks other tokens as sampled than its turns span; rebuild one from the other"
        )
