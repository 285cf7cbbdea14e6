from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlef.packing import assign_to_ranks, pack, split_micro_batches
from rlef.records import Batch, Episode
from tests.ppo_examples import episode, episodes

lengths = st.lists(st.integers(1, 50), max_size=30)


def two_episodes() -> list[Episode]:
    return [episode("..##.#", rewards=(0.0, 1.0)), episode(".##.", rewards=(-1.0,), seed=1)]


def test_sequences_lie_end_to_end_with_positions_from_zero() -> None:
    batch = pack(two_episodes(), value_level="turn")
    assert batch.cu_seqlens.tolist() == [0, 6, 10]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3]
    assert batch.token_ids.tolist() == [token for item in two_episodes() for token in item.token_ids]


def test_response_tokens_know_their_turn() -> None:
    batch = pack(two_episodes(), value_level="turn")
    assert batch.response_mask.tolist() == [mark == "#" for mark in "..##.#.##."]
    assert batch.token_turns.tolist() == [-1, -1, 0, 0, -1, 1, -1, 2, 2, -1]


def test_turns_know_their_sequence_and_reward() -> None:
    batch = pack(two_episodes(), value_level="turn")
    assert batch.turn_sequences.tolist() == [0, 0, 1]
    assert batch.turn_rewards.tolist() == [0.0, 1.0, -1.0]


def test_a_turn_value_is_read_at_the_last_token_before_the_response() -> None:
    batch = pack(two_episodes(), value_level="turn")
    assert batch.value_positions.tolist() == [1, 4, 6]
    assert batch.value_turns.tolist() == [0, 1, 2]
    assert batch.token_values.tolist() == batch.token_turns.tolist()


def test_a_token_value_is_read_just_before_each_response_token() -> None:
    batch = pack(two_episodes(), value_level="token")
    assert batch.value_positions.tolist() == [1, 2, 4, 6, 7]
    assert batch.value_turns.tolist() == [0, 0, 1, 2, 2]
    assert batch.token_values.tolist() == [-1, -1, 0, 1, -1, 2, -1, 3, 4, -1]


def test_behaviour_logprobs_are_the_samplers_inside_responses_and_zero_elsewhere() -> None:
    attempt = replace(episode(".##."), logprobs=[float("nan"), -0.5, -0.25, float("nan")])
    assert pack([attempt], value_level="turn").behaviour_logprobs.tolist() == [0.0, -0.5, -0.25, 0.0]


def test_tensors_have_the_types_that_the_record_promises() -> None:
    batch = pack(two_episodes(), value_level="turn")
    types = {field.name: getattr(batch, field.name).dtype for field in fields(Batch)}
    assert types.pop("cu_seqlens") == torch.int32
    assert types.pop("response_mask") == torch.bool
    assert types.pop("behaviour_logprobs") == types.pop("turn_rewards") == torch.float32
    assert set(types.values()) == {torch.int64}


@given(episodes(), st.sampled_from(["turn", "token"]))
def test_packing_is_packing_each_alone_and_shifting(made: list[Episode], level: str) -> None:
    whole = pack(made, value_level=level)
    tokens = turns = values = 0
    for sequence, item in enumerate(made):
        alone = pack([item], value_level=level)
        own_tokens = slice(tokens, tokens + alone.num_tokens)
        own_turns = slice(turns, turns + alone.num_turns)
        own_values = slice(values, values + alone.value_positions.shape[0])
        for name in ("token_ids", "position_ids", "response_mask", "behaviour_logprobs"):
            assert torch.equal(getattr(whole, name)[own_tokens], getattr(alone, name))
        inside = alone.response_mask
        assert torch.equal(whole.token_turns[own_tokens][inside], alone.token_turns[inside] + turns)
        assert torch.equal(whole.token_values[own_tokens][inside], alone.token_values[inside] + values)
        assert torch.equal(whole.value_positions[own_values], alone.value_positions + tokens)
        assert torch.equal(whole.value_turns[own_values], alone.value_turns + turns)
        assert torch.equal(whole.turn_rewards[own_turns], alone.turn_rewards)
        assert set(whole.turn_sequences[own_turns].tolist()) == {sequence}
        tokens, turns, values = own_tokens.stop, own_turns.stop, own_values.stop
    assert (tokens, turns) == (whole.num_tokens, whole.num_turns)


def test_no_episodes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"no episodes to pack; give at least one"):
        pack([], value_level="turn")


def test_a_response_without_a_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match=r"starts with a response; put a prompt"):
        pack([episode("##.#")], value_level="turn")


def test_an_episode_without_turns_is_refused() -> None:
    with pytest.raises(ValueError, match=r"has no turn; drop it before packing"):
        pack([episode("...")], value_level="turn")


def test_missing_rewards_are_refused() -> None:
    with pytest.raises(ValueError, match=r"has 0 rewards for 1 turns; fill them by turn_rewards"):
        pack([episode(".#", rewards=())], value_level="turn")


def test_columns_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match=r"has 2 token_ids, 3 sampled and 2 logprobs; make them equal"):
        pack([replace(episode(".#"), sampled=[False, True, True])], value_level="turn")


def test_sampled_marks_outside_the_turns_are_refused() -> None:
    with pytest.raises(ValueError, match=r"marks other tokens as sampled than its turns span"):
        pack([replace(episode("..#"), sampled=[False, True, True])], value_level="turn")


@pytest.mark.parametrize(("start", "end"), [(2, 2), (2, 4), (1, 0)])
def test_a_turn_that_is_empty_or_leaves_the_episode_is_refused(start: int, end: int) -> None:
    attempt = episode("..#")
    turn = replace(attempt.turns[0], start=start, end=end)
    with pytest.raises(ValueError, match=rf"turn 0, spans {start} to {end}; it must be a non-empty span"):
        pack([replace(attempt, turns=(turn,))], value_level="turn")


def test_overlapping_turns_are_refused() -> None:
    attempt = episode(".##")
    with pytest.raises(
        ValueError, match=r"turn 1, spans 1 to 3; it must be a non-empty span between 3 and 3"
    ):
        pack([replace(attempt, turns=attempt.turns * 2, rewards=(0.0, 0.0))], value_level="turn")


def test_micro_batches_are_few_and_equal() -> None:
    assert split_micro_batches([4, 4, 2, 2], max_tokens=6) == [[0, 2], [1, 3]]


def test_a_sequence_beyond_the_budget_is_alone() -> None:
    assert split_micro_batches([2, 9, 2], max_tokens=4) == [[0, 2], [1]]


@given(lengths, st.integers(1, 60))
def test_micro_batches_keep_the_budget_and_every_sequence_once(sizes: list[int], budget: int) -> None:
    groups = split_micro_batches(sizes, budget)
    assert sorted(index for group in groups for index in group) == list(range(len(sizes)))
    for group in groups:
        assert group == sorted(group)
        assert len(group) == 1 or sum(sizes[index] for index in group) <= budget


@given(lengths, st.integers(50, 60))
def test_micro_batches_are_less_than_twice_as_many_as_needed(sizes: list[int], budget: int) -> None:
    assert len(split_micro_batches(sizes, budget)) <= max(1, 2 * -(-sum(sizes) // budget))


@given(lengths, st.integers(1, 8))
def test_ranks_share_every_sequence_once(sizes: list[int], ranks: int) -> None:
    shares = assign_to_ranks(sizes, ranks)
    assert len(shares) == ranks
    assert sorted(index for share in shares for index in share) == list(range(len(sizes)))


@given(lengths, st.integers(1, 8))
def test_no_rank_has_more_than_another_by_over_one_sequence(sizes: list[int], ranks: int) -> None:
    tokens = [sum(sizes[index] for index in share) for share in assign_to_ranks(sizes, ranks)]
    assert max(tokens) - min(tokens) <= max(sizes, default=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: split_micro_batches([1], 0), r"max_tokens is 0; it must be at least 1"),
        (lambda: split_micro_batches([1, 0], 4), r"sequence 1 has length 0; it must be at least 1"),
        (lambda: assign_to_ranks([1], 0), r"ranks is 0; it must be at least 1"),
        (lambda: assign_to_ranks([-1], 2), r"sequence 0 has length -1; it must be at least 1"),
    ],
)
def test_impossible_divisions_are_refused(call: object, message: str) -> None:
    assert callable(call)
    with pytest.raises(ValueError, match=message):
        call()
