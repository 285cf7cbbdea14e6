"""From outcomes to the environment's reward of each turn (RLEF, section 2). Pure: no model, no tensors."""

from __future__ import annotations

from rlef.config import RewardConfig
from rlef.records import Episode, TurnOutcome


def turn_rewards(episode: Episode, rewards: RewardConfig) -> tuple[float, ...]:
    """The reward of each turn, without the KL term: one number per turn of `episode`.

    The last turn gets `rewards.solved` or `rewards.failed`, by the verdict on all tests. An earlier turn gets
    `rewards.no_code` if no program could be found in it, and otherwise 0. The paper's penalty is for a
    response without valid code, and we count only `TurnOutcome.NO_CODE`: a program with a syntax error is
    still an attempt. It runs, its traceback is feedback that the next turn can use, and its failure is paid
    for at the end; a response without any program leaves nothing to give feedback on. The last turn takes no
    such penalty, because its failure is already in `rewards.failed`.

    Raises:
        ValueError: the episode has no turn.
    """
    if not episode.turns:
        raise ValueError(
            f"episode {episode.number} of {episode.problem_id} has no turn; drop it before scoring"
        )
    earlier = (rewards.no_code if turn.outcome is TurnOutcome.NO_CODE else 0.0 for turn in episode.turns[:-1])
    return (*earlier, rewards.solved if episode.solved else rewards.failed)
