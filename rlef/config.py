"""One frozen tree of settings. Every constant of the paper is a named setting here, and its default is the
paper's.

A run file is TOML with these sections as tables; `a.b=c` on the command line overrides one value. Unknown
keys and values out of range are errors before anything starts. A function takes its own section, never the
whole tree.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
MessageTokens = Annotated[int, Field(ge=16)]  # room for the role markers, the cut mark and something to say
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
FiniteFloat = Annotated[float, Field(allow_inf_nan=False)]
Fraction = Annotated[float, Field(gt=0, le=1)]
# Runs are moved aside and their folders written to, so a name must not lead out of run.output_dir.
FolderName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.+-]*$")]

FeedbackKind = Literal["true", "none", "random"]
ValueLevel = Literal["turn", "token"]
GroupMethod = Literal["grpo", "rloo"]
Method = Literal["ppo", "grpo", "rloo", "sft"]
SamplerName = Literal["torch", "vllm"]
Recompute = Literal["none", "full"]
DType = Literal["float32", "bfloat16"]
ProblemOrder = Literal["shuffled", "easy_first"]
DialectChoice = Literal["own", "code_contests"]


class ConfigError(ValueError):
    """A setting that the user must mend. The message names the setting, the value and the mend."""


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, validate_default=True)


class RunConfig(Section):
    name: FolderName = "rlef"
    output_dir: str = "runs"
    seed: NonNegativeInt = 1
    steps: PositiveInt = 3000  # paper: 12,000 updates (8B) of 4 a step
    max_skipped_updates: NonNegativeInt = 8  # in a row, of one network, before the run ends; 0: no end


class ModelConfig(Section):
    path: str = "embedded"  # a Hugging Face folder, or "embedded" for the model shipped with rlef


class ParallelConfig(Section):
    """Sizes of the Megatron layout; what is left of the processes is data parallel."""

    processes: PositiveInt = 1  # started by `rlef train` itself when torchrun did not start it
    tensor: PositiveInt = 1
    pipeline: PositiveInt = 1
    sequence_parallel: bool = False  # norms and residuals split over tensor parallel ranks, by tokens
    recompute: Recompute = "none"  # "full": keep what goes into each layer, and compute the rest again
    distributed_optimizer: bool = False  # its state split over data parallel ranks
    threads_per_process: PositiveInt = 1  # on CPU
    timeout_s: PositiveInt = 600  # of one collective
    dtype: DType = "float32"  # of weights and activations; what the optimiser steps is always float32
    virtual_pipeline: PositiveInt = 1  # chunks of layers per pipeline rank; above 1: megatron's interleaving
    context: PositiveInt = 1  # ranks that share the tokens of each pack
    offload_reference: bool = False  # its weights in host memory, and on the device only while it scores
    sampling_processes: NonNegativeInt = 0  # the last so many only sample, the others learn; 0: all do both
    silence_s: PositiveInt = 60  # without a sign of life, where some processes sample and others learn

    @property
    def replica(self) -> int:
        """Processes of one data-parallel replica."""
        return self.tensor * self.pipeline * self.context

    @property
    def learners(self) -> int:
        """How many processes learn; they come first."""
        return self.processes - self.sampling_processes

    @property
    def samplers(self) -> int:
        """How many processes sample."""
        return self.sampling_processes or self.processes


class ProblemsConfig(Section):
    train: str = "hidden_conventions:train"  # a JSONL file, or an embedded source
    eval: str = "hidden_conventions:heldout"
    train_size: PositiveInt = 8192
    eval_size: PositiveInt = 256
    seed: NonNegativeInt = 0
    max_test_bytes: PositiveInt = (
        16 << 20
    )  # input and expected output of one test; a problem may hold 16 such
    order: ProblemOrder = "shuffled"  # "easy_first": by solve rate or rating, in each round
    skip_after_solved: NonNegativeInt = 0  # visits in a row, until a problem is left out; 0: never
    skip_after_unsolved: NonNegativeInt = 0  # the same, of visits that did not solve it
    skip_rounds: PositiveInt = 3  # through the problems, for which it is left out
    dialect: DialectChoice = "own"  # of feedback: each problem's own, or one for all, without stubs


class RolloutConfig(Section):
    episodes_per_step: PositiveInt = 1024
    turns: PositiveInt = 3
    feedback: FeedbackKind = "true"
    temperature: NonNegativeFloat = 1.0
    top_p: Fraction = 1.0
    max_prompt_tokens: MessageTokens = 2048  # cut on the left
    max_feedback_tokens: MessageTokens = 1024  # cut on the right, marked
    max_test_characters: PositiveInt = 512  # of one test's input or output inside feedback
    max_response_tokens: PositiveInt = 1024
    sampler: SamplerName = "torch"  # the embedded one, or vLLM, which is an extra
    slots: PositiveInt = 128  # sequences that the sampler decodes at once
    overlap: bool = False  # programs run while other episodes decode; results depend on the clock by rounding
    max_staleness: NonNegativeInt = 0  # versions that a token may be older than the weights it trains
    timeout_s: PositiveInt = 3600  # of the wait for a step's episodes: see docs/settings.md
    rollouts_per_problem: PositiveInt = 1  # of one step: the group that grpo and rloo compare
    few_shot: str = ""  # a JSONL file of example dialogs, which stand before each problem's own
    max_few_shot_tokens: NonNegativeInt = 0  # that the examples may take

    @property
    def problems_per_step(self) -> int:
        return self.episodes_per_step // self.rollouts_per_problem


class VllmConfig(Section):
    """What `rollout.sampler = "vllm"` needs besides."""

    memory_fraction: Fraction = 0.4  # of a GPU's memory, for weights and cache; of the host's on a CPU
    tensor_parallel: PositiveInt = 1  # GPUs over which one sampler's model is split
    dtype: DType = "float32"


class ExecutorConfig(Section):
    workers: NonNegativeInt = 0  # 0: this process's share of the machine's cores
    default_time_limit_s: PositiveFloat = 10.0
    default_memory_limit_bytes: PositiveInt = 1_000_000_000
    allow_missing: Annotated[tuple[str, ...], Field(strict=False)] = ()  # isolation layers that may be absent
    memory_cgroup: str = ""  # a cgroup's folder, below which memory is cut off at its limit
    cores: NonNegativeInt = 0  # of a machine, for the programs of all its processes; 0: no budget
    patience_s: PositiveFloat = 60.0  # beyond a test's wall limit, until a silent worker is replaced
    cache_bytes: NonNegativeInt = 64 << 20  # of results that a process keeps for equal programs; 0: none
    learn_order: bool = True  # private tests that failed most often first


class RewardConfig(Section):
    solved: FiniteFloat = 1.0
    failed: FiniteFloat = -1.0
    no_code: FiniteFloat = -0.2  # for a response without valid code that is not the last
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
    method: Method = "ppo"  # what the policy learns from: see docs/settings.md

    @property
    def has_value(self) -> bool:
        """Whether a value network is built and trained."""
        return self.method == "ppo"

    @property
    def group_method(self) -> GroupMethod | None:
        """How an episode is measured against others of the same problem, if it is."""
        return self.method if self.method in ("grpo", "rloo") else None


class OptimizerConfig(Section):
    lr: PositiveFloat = 2e-7
    value_lr: PositiveFloat = 2e-7
    weight_decay: NonNegativeFloat = 0.1
    beta1: Fraction = 0.9
    beta2: Fraction = 0.95
    eps: PositiveFloat = 1e-8
    warmup_updates: NonNegativeInt = 50  # linear, then constant
    clip_grad: PositiveFloat = 1.0


class Budget(Section):
    """n@k: at most n submissions, chosen among k responses that are sampled so."""

    n: PositiveInt
    k: PositiveInt
    temperature: NonNegativeFloat
    top_p: Fraction


class EvaluationConfig(Section):
    turns: PositiveInt = 3  # the budget of responses, whatever training used
    every_steps: NonNegativeInt = 0  # 0: only at the start and at the end
    rollouts_per_problem: PositiveInt = 20  # paper: 200 (CodeContests), 20 (HumanEval+, MBPP+)
    temperature: NonNegativeFloat = 0.2
    top_p: Fraction = 0.95
    bootstrap_samples: PositiveInt = 200
    # What follows is for `rlef eval --episodes`.
    budgets: Annotated[tuple[Budget, ...], Field(strict=False, min_length=1)] = (
        Budget(n=1, k=3, temperature=0.2, top_p=0.95),
        Budget(n=10, k=100, temperature=1.0, top_p=0.95),
    )
    turn_limits: Annotated[tuple[PositiveInt, ...], Field(strict=False, min_length=1)] = (1, 3, 5, 10)
    feedback: Annotated[tuple[FeedbackKind, ...], Field(strict=False, min_length=1)] = (
        "true",
        "none",
        "random",
    )


class ServerConfig(Section):
    """An OpenAI-compatible server whose model `rlef eval` measures."""

    url: str = ""  # of the API, such as http://127.0.0.1:8000/v1; empty: model.path is evaluated
    model: str = ""  # its name on the server
    api_key_env: str = ""  # the environment variable that holds the key; empty: none is sent
    concurrency: PositiveInt = 32  # requests at once
    timeout_s: PositiveFloat = 600.0  # of one request
    retries: NonNegativeInt = 5  # of one request, with growing pauses


class CheckpointConfig(Section):
    every_steps: PositiveInt = 50
    keep: PositiveInt = 2
    asynchronous: bool = True  # a step waits for a copy in memory, not for the disk


class Config(Section):
    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    parallel: ParallelConfig = ParallelConfig()
    problems: ProblemsConfig = ProblemsConfig()
    rollout: RolloutConfig = RolloutConfig()
    vllm: VllmConfig = VllmConfig()
    executor: ExecutorConfig = ExecutorConfig()
    rewards: RewardConfig = RewardConfig()
    ppo: PPOConfig = PPOConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    server: ServerConfig = ServerConfig()

    @property
    def engine_ranks(self) -> int:
        """Processes that one sampler spans, where it spans any but its own: then they only sample."""
        spans = self.rollout.sampler == "vllm" and self.parallel.sampling_processes > 0
        return self.vllm.tensor_parallel if spans else 1

    @property
    def engines(self) -> int:
        """Samplers that share the episodes of a step."""
        return self.parallel.samplers // self.engine_ranks
