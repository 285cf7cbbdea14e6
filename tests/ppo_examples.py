"""Episodes small enough to follow by hand, drawn as strings."""

from __future__ import annotations

import random
from itertools import groupby

import torch
from hypothesis import strategies as st

from rlef.records import Episode, Turn, TurnOutcome

VOCAB = 7


def episode(
    drawing: str,
    *,
    rewards: tuple[float, ...] | None = None,
    outcomes: tuple[TurnOutcome, ...] | None = None,
    solved: bool = False,
    seed: int = 0,
) -> Episode:
    """`..##.#` is two tokens of prompt, a response of two, one of feedback and a response of one.

    Token ids and log-probs are made up from `seed`; rewards are 0 unless given.
    """
    spans, position = [], 0
    for mark, run in groupby(drawing):
        length = len(list(run))
        if mark == "#":
            spans.append((position, position + length))
        position += length
    outcomes = outcomes or (TurnOutcome.WRONG_OUTPUT,) * len(spans)
    draw = random.Random(seed)
    sampled = [mark == "#" for mark in drawing]
    return Episode(
        problem_id="example",
        number=seed,
        token_ids=[draw.randrange(VOCAB) for _ in drawing],
        sampled=sampled,
        logprobs=[-draw.random() if chosen else 0.0 for chosen in sampled],
        versions=[0 if chosen else -1 for chosen in sampled],
        turns=tuple(
            Turn(start=start, end=end, finish_reason="stop", code=None, outcome=outcome, public_results=())
            for (start, end), outcome in zip(spans, outcomes, strict=True)
        ),
        solved=solved,
        rewards=(0.0,) * len(spans) if rewards is None else rewards,
    )


lengths = st.integers(1, 3)
turns = st.lists(st.tuples(lengths, lengths, st.sampled_from([-1.0, -0.2, 0.0, 1.0])), min_size=1, max_size=3)


@st.composite
def episodes(draw: st.DrawFn) -> list[Episode]:
    """One to three episodes of one to three turns, with rewards; some end in an observation."""
    made = []
    for seed, spans in enumerate(draw(st.lists(turns, min_size=1, max_size=3))):
        drawing = "".join("." * observed + "#" * chosen for observed, chosen, _ in spans)
        rewards = tuple(reward for _, _, reward in spans)
        made.append(episode(drawing + "." * (seed % 2), rewards=rewards, seed=seed))
    return made


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def log_uniform(tokens: int, *, seed: int = 0) -> torch.Tensor:
    """Made-up log-probs of so many tokens."""
    return torch.rand(tokens, generator=torch.Generator().manual_seed(seed)).clamp(min=0.01).log()
