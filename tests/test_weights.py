"""Weights in bounded buckets, in this process alone. The layouts of several ranks have their own tests."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from rlef.shards import Cut, StageWeight
from rlef.weights import _buckets as buckets


def weight_of(elements: int) -> StageWeight:
    return StageWeight(parameter="p", names=("n",), shapes=((elements,),), cut=Cut.REPLICATED)


@given(st.lists(st.integers(1, 20), max_size=12), st.integers(1, 30))
def test_a_bucket_is_bounded_unless_one_weight_alone_is_larger(elements: list[int], bound: int) -> None:
    made = list(buckets([weight_of(number) for number in elements], bound))
    assert [weight.elements for bucket in made for weight in bucket] == elements
    assert all(len(bucket) == 1 or sum(weight.elements for weight in bucket) <= bound for bucket in made)
