"""One frozen tree of settings. Every constant of the paper is a named setting here, and its default is the
paper's.

A run file is TOML with these sections as tables; `a.b=c` on the command line overrides one value. Unknown
keys and values out of range are errors before anything starts. A function takes its own section, never the
whole tree.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError

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


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """The settings of a TOML file, with `section.key=value` overrides; a `ConfigError` names what to mend."""
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"there is no run file {str(path)!r}; configs/ has examples") from None
    except OSError as error:
        raise ConfigError(f"the run file {str(path)!r} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from None
    for override in overrides:
        _apply(tree, override)
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(explain(error)) from None
    check_arithmetic(config)
    return config


def check_arithmetic(config: Config) -> None:
    """Numbers that must fit each other, checked before anything starts."""
    if config.rollout.temperature != 1 or config.rollout.top_p != 1:
        raise ConfigError(
            f"rollout.temperature = {config.rollout.temperature} and rollout.top_p = {config.rollout.top_p}: "
            "the policy is trained on what it samples untempered, so both must be 1 (evaluation has its own)"
        )
    if bool(config.rollout.few_shot) != bool(config.rollout.max_few_shot_tokens):
        raise ConfigError(
            f"rollout.few_shot = {config.rollout.few_shot!r} and rollout.max_few_shot_tokens = "
            f"{config.rollout.max_few_shot_tokens}: set both, a file of examples and their room, or neither"
        )
    _check_evaluation(config.evaluation)
    episodes, updates = config.rollout.episodes_per_step, config.ppo.updates_per_step
    if episodes % updates:
        raise ConfigError(
            f"rollout.episodes_per_step = {episodes} is not a multiple of ppo.updates_per_step = {updates}; "
            f"use {max(1, episodes // updates) * updates}"
        )
    _check_method(config)
    parallel = config.parallel
    if parallel.sampling_processes >= parallel.processes:
        raise ConfigError(
            f"parallel.sampling_processes = {parallel.sampling_processes} of parallel.processes = "
            f"{parallel.processes} leave none to learn; use at most {parallel.processes - 1}"
        )
    if parallel.learners % parallel.replica:
        less = f" - parallel.sampling_processes = {parallel.learners}" if parallel.sampling_processes else ""
        raise ConfigError(
            f"parallel.processes = {parallel.processes}{less} is not a multiple of parallel.tensor x "
            f"parallel.pipeline x parallel.context = {parallel.replica}; "
            f"use {parallel.replica + parallel.sampling_processes}"
        )
    if config.parallel.sequence_parallel and config.parallel.tensor == 1:
        raise ConfigError(
            "parallel.sequence_parallel = true splits the tokens over tensor parallel ranks, and "
            "parallel.tensor = 1; raise parallel.tensor or set parallel.sequence_parallel=false"
        )
    if parallel.virtual_pipeline > 1 and parallel.pipeline == 1:
        raise ConfigError(
            f"parallel.virtual_pipeline = {parallel.virtual_pipeline} interleaves the stages of a "
            "pipeline, and parallel.pipeline = 1; raise it or set parallel.virtual_pipeline=1"
        )
    data_parallel = parallel.learners // parallel.replica
    if episodes // updates < data_parallel:
        raise ConfigError(
            f"rollout.episodes_per_step / ppo.updates_per_step = {episodes // updates} sequences an update "
            f"cannot be shared by {data_parallel} data-parallel ranks; raise rollout.episodes_per_step"
        )


def _check_method(config: Config) -> None:
    episodes, rollouts = config.rollout.episodes_per_step, config.rollout.rollouts_per_problem
    if episodes % rollouts:
        raise ConfigError(
            f"rollout.episodes_per_step = {episodes} is not a multiple of rollout.rollouts_per_problem = "
            f"{rollouts}; use {max(1, episodes // rollouts) * rollouts}"
        )
    ppo = config.ppo
    if ppo.group_method is not None:
        if rollouts < 2:
            raise ConfigError(
                f"ppo.method = {ppo.method!r} compares the rollouts of one problem, and "
                f"rollout.rollouts_per_problem = {rollouts}; use at least 2, such as 8"
            )
        if config.rollout.problems_per_step % ppo.updates_per_step:
            share = rollouts * ppo.updates_per_step
            raise ConfigError(
                f"rollout.episodes_per_step = {episodes} is not a multiple of rollout.rollouts_per_problem x "
                f"ppo.updates_per_step = {share}, so that each update has whole groups; "
                f"use {max(1, episodes // share) * share}"
            )
    if not ppo.has_value and ppo.value_level != "turn":
        raise ConfigError(
            f"ppo.value_level = {ppo.value_level!r} is of a value network, and ppo.method = "
            f"{ppo.method!r} has none; set ppo.value_level=turn"
        )
    if not ppo.has_value and ppo.value_warmup_steps:
        raise ConfigError(
            f"ppo.value_warmup_steps = {ppo.value_warmup_steps} is of a value network, and ppo.method = "
            f"{ppo.method!r} has none; set ppo.value_warmup_steps=0"
        )


def of_learners(config: Config) -> Config:
    """The settings without the processes that only sample, for what takes the learners alone."""
    sizes = {"processes": config.parallel.learners, "sampling_processes": 0}
    return config.model_copy(update={"parallel": config.parallel.model_copy(update=sizes)})


def _check_evaluation(evaluation: EvaluationConfig) -> None:
    for name in ("budgets", "turn_limits", "feedback"):
        values = getattr(evaluation, name)
        if len(set(values)) < len(values):
            raise ConfigError(f"evaluation.{name} names one of its values twice; name each once")
    for budget in evaluation.budgets:
        if budget.n > budget.k:
            raise ConfigError(
                f"evaluation.budgets: n = {budget.n} submissions of k = {budget.k} responses; n is at most k"
            )


def longest_dialog(config: Config) -> int:
    """The most tokens that an episode of training or evaluation can have."""
    rollout, turns = config.rollout, max(config.rollout.turns, config.evaluation.turns)
    feedback = rollout.max_feedback_tokens + 1  # an unfinished response is closed by an end-of-turn token
    told = rollout.max_few_shot_tokens + rollout.max_prompt_tokens + (turns - 1) * feedback
    return told + turns * rollout.max_response_tokens


def check_context(config: Config, max_position_embeddings: int) -> None:
    """The longest possible dialog must fit the model's context."""
    longest = longest_dialog(config)
    if longest > max_position_embeddings:
        raise ConfigError(
            f"a dialog can grow to {longest} tokens "
            f"(rollout.max_few_shot_tokens = {config.rollout.max_few_shot_tokens}, "
            f"rollout.max_prompt_tokens = {config.rollout.max_prompt_tokens}, "
            f"rollout.max_response_tokens = {config.rollout.max_response_tokens}, "
            f"rollout.max_feedback_tokens = {config.rollout.max_feedback_tokens}, "
            f"rollout.turns = {config.rollout.turns}, evaluation.turns = {config.evaluation.turns}), "
            f"but the model's context holds {max_position_embeddings}; lower one of them"
        )


def describe_arithmetic(config: Config) -> dict[str, int]:
    """What the batch settings amount to, for `--dry-run`."""
    parallel = config.parallel
    data_parallel = parallel.learners // parallel.replica
    episodes = config.rollout.episodes_per_step
    return {
        "processes": parallel.processes,
        "processes that learn": parallel.learners,
        "processes that sample": parallel.samplers,
        "samplers": config.engines,
        "data-parallel replicas": data_parallel,
        "episodes a step": episodes,
        "problems a step": config.rollout.problems_per_step,
        "episodes of each sampler (at most)": -(-episodes // config.engines),
        "sequences an update": episodes // config.ppo.updates_per_step,
        "sequences an update and replica (at most)": -(
            -(episodes // config.ppo.updates_per_step) // data_parallel
        ),
        "updates in all": config.run.steps * config.ppo.updates_per_step,
        "episodes in all": config.run.steps * episodes,
        "longest dialog in tokens": longest_dialog(config),
    }


def _apply(tree: dict[str, Any], override: str) -> None:
    name, separator, text = override.partition("=")
    section, dot, key = name.partition(".")
    if not separator or not dot:
        raise ConfigError(f"override {override!r} is not of the form section.key=value, such as run.seed=2")
    value = _read_value(_annotation(section, key), text)
    table = tree.setdefault(section, {})
    if not isinstance(table, dict):
        raise ConfigError(f"override {override!r}: {section!r} is not a section")
    table[key] = value


def _annotation(section: str, key: str) -> object:
    """The type of a setting, or None where there is no such setting."""
    table = Config.model_fields[section].annotation if section in Config.model_fields else None
    if not isinstance(table, type) or not issubclass(table, BaseModel) or key not in table.model_fields:
        return None
    return table.model_fields[key].annotation


def _read_value(annotation: object, text: str) -> Any:
    """The command line's text in the setting's type: bare words need no quotes, lists no brackets."""
    value = _read_toml(text)
    if get_origin(annotation) is tuple and not isinstance(value, list):
        words = [word.strip() for word in text.split(",") if word.strip()]
        return words if _is_text(get_args(annotation)[0]) else [_read_toml(word) for word in words]
    return text if _is_text(annotation) and not isinstance(value, str) else value


def _read_toml(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _is_text(annotation: object) -> bool:
    return annotation is str or get_origin(annotation) is Literal


def explain(invalid: ValidationError) -> str:
    """The first fault that pydantic found in settings, in one line."""
    error = invalid.errors()[0]
    path = tuple(str(part) for part in error["loc"])
    name = ".".join(path)
    if error["type"] == "missing":
        return f"{name} is missing; give it beside the others"
    if error["type"] != "extra_forbidden":
        said = _mend_of(error["type"], error["input"], error.get("ctx", {})) or error["msg"]
        return f"{name} = {error['input']!r}: {said}" if name else said
    known = _settings_beside(path)
    near = difflib.get_close_matches(path[-1], known, n=1)
    hint = f"did you mean {'.'.join((*path[:-1], near[0]))!r}?" if near else "known keys: " + ", ".join(known)
    return f"unknown setting {name!r}; {hint}"


# By pydantic's name of a fault, which says what it expected.
_MENDS = {
    "bool_type": "write true or false",
    "finite_number": "give a finite number",
    "float_type": "give a number",
    "greater_than": "give more than {gt:g}",
    "greater_than_equal": "give at least {ge:g}",
    "int_type": "give a whole number",
    "less_than_equal": "give at most {le:g}",
    "literal_error": "use {expected}",
    "model_type": "write a table of settings",
    "string_pattern_mismatch": "use letters, digits and _ . + -, with a letter, a digit or _ at the start",
    "string_type": "write text",
    "too_short": "give at least {min_length}",
    "tuple_type": "write a list, as in [1, 3]",
}


def _mend_of(fault: str, value: object, expected: Mapping[str, Any]) -> str:
    """Empty for a fault that no setting has so far."""
    mend = _MENDS.get(fault, "").format_map(expected)
    if fault == "literal_error":
        names = re.findall("'([^']*)'", expected["expected"])
        near = difflib.get_close_matches(str(value), names, n=1)
        return f"{mend}; did you mean {near[0]!r}?" if near else mend
    return mend


def _settings_beside(path: Sequence[str]) -> list[str]:
    """What could stand in the place of a path's last name: in the tree, a section or a section's tables."""
    table: Any = Config
    for name in path[:-1]:
        if name.isdecimal():  # the place in a list of tables
            continue
        annotation = table.model_fields[name].annotation
        table = get_args(annotation)[0] if get_origin(annotation) is tuple else annotation
    return list(table.model_fields)
