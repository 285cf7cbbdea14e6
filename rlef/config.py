"""One frozen tree of settings. Every constant of the paper is a named setting here, and its default is the paper's.

A run file is TOML with these sections as tables; `a.b=c` on the command line overrides one value. Unknown keys and
values out of range are errors before anything starts. A function takes its own section, never the whole tree.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(gt=0, le=1)]

FeedbackKind = Literal["true", "none", "random"]
ValueLevel = Literal["turn", "token"]


class ConfigError(ValueError):
    """A setting that the user must mend. The message names the setting, the value and the mend."""


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, validate_default=True)


class RunConfig(Section):
    name: str = "rlef"
    output_dir: str = "runs"
    seed: NonNegativeInt = 1
    steps: PositiveInt = 3000  # paper: 12,000 updates (8B) of 4 a step


class ModelConfig(Section):
    path: str = "embedded"  # a Hugging Face folder, or "embedded" for the model shipped with rlef


class ParallelConfig(Section):
    """Sizes of the Megatron layout; what is left of the processes is data parallel."""

    processes: PositiveInt = 1  # started by `rlef train` itself when torchrun did not start it
    tensor: PositiveInt = 1
    pipeline: PositiveInt = 1
    threads_per_process: PositiveInt = 1  # on CPU
    timeout_s: PositiveInt = 600  # of one collective


class ProblemsConfig(Section):
    train: str = "hidden_conventions:train"  # a JSONL file, or an embedded source
    eval: str = "hidden_conventions:heldout"
    train_size: PositiveInt = 8192
    eval_size: PositiveInt = 256
    seed: NonNegativeInt = 0


class RolloutConfig(Section):
    episodes_per_step: PositiveInt = 1024
    turns: PositiveInt = 3
    feedback: FeedbackKind = "true"
    temperature: NonNegativeFloat = 1.0
    top_p: Fraction = 1.0
    max_prompt_tokens: PositiveInt = 2048  # cut on the left
    max_feedback_tokens: PositiveInt = 1024  # cut on the right, marked
    max_test_characters: PositiveInt = 512  # of one test's input or output inside feedback
    max_response_tokens: PositiveInt = 1024
    slots: PositiveInt = 128  # sequences that the embedded sampler decodes at once


class ExecutorConfig(Section):
    workers: NonNegativeInt = 0  # 0: this process's share of the machine's cores
    default_time_limit_s: PositiveFloat = 10.0
    default_memory_limit_bytes: PositiveInt = 1_000_000_000
    allow_missing: tuple[str, ...] = ()  # isolation layers that may be absent, by name


class RewardConfig(Section):
    solved: float = 1.0
    failed: float = -1.0
    no_code: float = -0.2  # for a response without valid code that is not the last
    kl_coef: NonNegativeFloat = 0.05  # beta, on the mean token log-ratio of a response


class PPOConfig(Section):
    updates_per_step: PositiveInt = 4  # paper: 1024 rollouts make 4 updates of 256 sequences
    value_level: ValueLevel = "turn"
    clip_ratio: PositiveFloat = 0.2
    value_clip: PositiveFloat = 0.2  # alpha
    entropy_coef: NonNegativeFloat = 0.0
    behaviour_correction: bool = True  # stopgrad(min(pi / pi_behaviour, 1))
    normalise_advantages: bool = True
    value_warmup_steps: NonNegativeInt = 0  # first steps that train the value network alone
    micro_batch_tokens: PositiveInt = 16384


class OptimizerConfig(Section):
    lr: PositiveFloat = 2e-7
    value_lr: PositiveFloat = 2e-7
    weight_decay: NonNegativeFloat = 0.1
    beta1: Fraction = 0.9
    beta2: Fraction = 0.95
    eps: PositiveFloat = 1e-8
    warmup_updates: NonNegativeInt = 50  # linear, then constant
    clip_grad: PositiveFloat = 1.0


class EvaluationConfig(Section):
    every_steps: NonNegativeInt = 0  # 0: only at the start and at the end
    rollouts_per_problem: PositiveInt = 20  # paper: 200 (CodeContests), 20 (HumanEval+, MBPP+)
    temperature: NonNegativeFloat = 0.2
    top_p: Fraction = 0.95
    bootstrap_samples: PositiveInt = 200


class CheckpointConfig(Section):
    every_steps: PositiveInt = 50
    keep: PositiveInt = 2


class Config(Section):
    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    parallel: ParallelConfig = ParallelConfig()
    problems: ProblemsConfig = ProblemsConfig()
    rollout: RolloutConfig = RolloutConfig()
    executor: ExecutorConfig = ExecutorConfig()
    rewards: RewardConfig = RewardConfig()
    ppo: PPOConfig = PPOConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
