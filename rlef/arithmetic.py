"""Numbers of the settings that must fit each other, and what they amount to."""

from __future__ import annotations

from rlef.config import Config, ConfigError, EvaluationConfig, ParallelConfig, RolloutConfig


def check_arithmetic(config: Config) -> None:
    """Before anything starts.

    Raises:
        ConfigError: names the settings that do not fit, and what would do.
    """
    _check_rollout(config.rollout)
    _check_evaluation(config.evaluation)
    episodes, updates = config.rollout.episodes_per_step, config.ppo.updates_per_step
    if episodes % updates:
        raise ConfigError(
            f"rollout.episodes_per_step = {episodes} is not a multiple of ppo.updates_per_step = {updates}; "
            f"use {max(1, episodes // updates) * updates}"
        )
    _check_method(config)
    _check_processes(config.parallel)
    data_parallel = config.parallel.learners // config.parallel.replica
    if episodes // updates < data_parallel:
        raise ConfigError(
            f"rollout.episodes_per_step / ppo.updates_per_step = {episodes // updates} sequences an update "
            f"cannot be shared by {data_parallel} data-parallel ranks; raise rollout.episodes_per_step"
        )


def _check_rollout(rollout: RolloutConfig) -> None:
    if rollout.temperature != 1 or rollout.top_p != 1:
        raise ConfigError(
            f"rollout.temperature = {rollout.temperature} and rollout.top_p = {rollout.top_p}: "
            "the policy is trained on what it samples untempered, so both must be 1 (evaluation has its own)"
        )
    if bool(rollout.few_shot) != bool(rollout.max_few_shot_tokens):
        raise ConfigError(
            f"rollout.few_shot = {rollout.few_shot!r} and rollout.max_few_shot_tokens = "
            f"{rollout.max_few_shot_tokens}: set both, a file of examples and their room, or neither"
        )


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


def _check_processes(parallel: ParallelConfig) -> None:
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
    if parallel.sequence_parallel and parallel.tensor == 1:
        raise ConfigError(
            "parallel.sequence_parallel = true splits the tokens over tensor parallel ranks, and "
            "parallel.tensor = 1; raise parallel.tensor or set parallel.sequence_parallel=false"
        )
    if parallel.virtual_pipeline > 1 and parallel.pipeline == 1:
        raise ConfigError(
            f"parallel.virtual_pipeline = {parallel.virtual_pipeline} interleaves the stages of a "
            "pipeline, and parallel.pipeline = 1; raise it or set parallel.virtual_pipeline=1"
        )


def of_learners(config: Config) -> Config:
    """The settings without the processes that only sample, for what takes the learners alone."""
    sizes = {"processes": config.parallel.learners, "sampling_processes": 0}
    return config.model_copy(update={"parallel": config.parallel.model_copy(update=sizes)})


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
