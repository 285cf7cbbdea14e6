"""The arithmetic of PPO for language models: log-probabilities, losses, advantages, returns and whitening."""

from rlef_kernels.advantages import AdvantageEstimate, gae, turn_gae
from rlef_kernels.linear import linear_ppo_loss
from rlef_kernels.logprobs import TokenLogprobs, logprobs_from_logits
from rlef_kernels.policy import PolicyMetrics, ppo_policy_loss
from rlef_kernels.policy_logits import ppo_policy_loss_from_logits
from rlef_kernels.returns import turn_returns
from rlef_kernels.segments import mean_weights, segment_count, segment_expand, segment_mean, segment_sum
from rlef_kernels.value import ValueMetrics, value_loss
from rlef_kernels.whitening import masked_mean, masked_variance, masked_whiten

__all__ = [
    "AdvantageEstimate",
    "PolicyMetrics",
    "TokenLogprobs",
    "ValueMetrics",
    "gae",
    "linear_ppo_loss",
    "logprobs_from_logits",
    "masked_mean",
    "masked_variance",
    "masked_whiten",
    "mean_weights",
    "ppo_policy_loss",
    "ppo_policy_loss_from_logits",
    "segment_count",
    "segment_expand",
    "segment_mean",
    "segment_sum",
    "turn_gae",
    "turn_returns",
    "value_loss",
]
