"""Settings: the paper's constants, and what a user can get wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from rlef.arithmetic import check_context, describe_arithmetic, longest_dialog
from rlef.config import Config, ConfigError, EvaluationConfig, RolloutConfig
from rlef.settings_file import load_config

ROOT = Path(__file__).parents[1]

# RLEF, sections 2 and 3 and the appendix on training; what it leaves open is our choice.
PAPER = {
    "rollout.episodes_per_step": 1024,
    "rollout.turns": 3,
    "rollout.feedback": "true",
    "rollout.temperature": 1.0,
    "rollout.top_p": 1.0,
    "rollout.max_prompt_tokens": 2048,
    "rollout.max_feedback_tokens": 1024,
    "rollout.max_test_characters": 512,
    "executor.default_time_limit_s": 10.0,
    "executor.default_memory_limit_bytes": 1_000_000_000,
    "rewards.solved": 1.0,
    "rewards.failed": -1.0,
    "rewards.no_code": -0.2,
    "rewards.kl_coef": 0.05,
    "ppo.updates_per_step": 4,
    "ppo.value_level": "turn",
    "ppo.clip_ratio": 0.2,
    "ppo.value_clip": 0.2,
    "ppo.behaviour_correction": True,
    "ppo.normalise_advantages": True,
    "ppo.entropy_coef": 0.0,
    "ppo.value_warmup_steps": 0,
    "optimizer.lr": 2e-7,
    "optimizer.value_lr": 2e-7,
    "optimizer.weight_decay": 0.1,
    "optimizer.warmup_updates": 50,
    "optimizer.clip_grad": 1.0,
    "evaluation.temperature": 0.2,
    "evaluation.top_p": 0.95,
    "evaluation.turns": 3,
    "evaluation.rollouts_per_problem": 20,
    "evaluation.bootstrap_samples": 200,
}


def load(tmp_path: Path, text: str = "", *overrides: str) -> Config:
    path = tmp_path / "run.toml"
    path.write_text(text, encoding="utf-8")
    return load_config(path, overrides)


def error_of(tmp_path: Path, text: str = "", *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, *overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(("setting", "constant"), PAPER.items(), ids=PAPER)
def test_a_default_is_the_papers(setting: str, constant: object) -> None:
    section, key = setting.split(".")
    default = getattr(getattr(Config(), section), key)
    assert (default, type(default)) == (constant, type(constant))


def test_the_paper_makes_12000_updates() -> None:
    config = Config()
    assert config.run.steps * config.ppo.updates_per_step == 12_000


def test_a_file_overrides_defaults_and_the_command_line_overrides_the_file(tmp_path: Path) -> None:
    text = "[run]\nseed = 2\nsteps = 5\n"
    config = load(tmp_path, text, "run.seed=3", "rollout.turns=1", "run.seed=4")
    assert (config.run.seed, config.run.steps, config.rollout.turns) == (4, 5, 1)


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("optimizer.lr=1e-3", "optimizer", "lr", 0.001),
        ("optimizer.lr=1", "optimizer", "lr", 1.0),
        ("ppo.normalise_advantages=false", "ppo", "normalise_advantages", False),
        ("run.name=first", "run", "name", "first"),
        ('run.name="7"', "run", "name", "7"),
        ("model.path=/models/a=b", "model", "path", "/models/a=b"),
        ("evaluation.turn_limits=1,3", "evaluation", "turn_limits", (1, 3)),
        ("evaluation.turn_limits=3", "evaluation", "turn_limits", (3,)),
        ("evaluation.feedback=true,none", "evaluation", "feedback", ("true", "none")),
        ('executor.allow_missing=["landlock"]', "executor", "allow_missing", ("landlock",)),
    ],
)
def test_an_override_is_a_toml_value_or_a_bare_word(
    tmp_path: Path, override: str, section: str, key: str, value: object
) -> None:
    assert getattr(getattr(load(tmp_path, "", override), section), key) == value


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.seed", "override 'run.seed' is not of the form section.key=value, such as run.seed=2"),
        ("seed=2", "override 'seed=2' is not of the form section.key=value"),
        ("run.seed=", "run.seed = '': give a whole number"),
        ("rollout.turn=2", "unknown setting 'rollout.turn'; did you mean 'rollout.turns'?"),
        ("rolout.turns=2", "unknown setting 'rolout'; did you mean 'rollout'?"),
        ("checkpoint.zzz=2", "unknown setting 'checkpoint.zzz'; known keys: every_steps, keep, asynchronous"),
        ("rollout.turns=0", "rollout.turns = 0: give at least 1"),
        ("rollout.turns=two", "rollout.turns = 'two': give a whole number"),
        ('rollout.turns="2"', "rollout.turns = '2': give a whole number"),
        ("rollout.turns=true", "rollout.turns = True: give a whole number"),
        ("rollout.turns=2.5", "rollout.turns = 2.5: give a whole number"),
        ("rollout.top_p=1.5", "rollout.top_p = 1.5: give at most 1"),
        ("optimizer.lr=nan", "optimizer.lr = nan: give a finite number"),
        ("rewards.failed=-inf", "rewards.failed = -inf: give a finite number"),
        ("rollout.feedback=some", "rollout.feedback = 'some': use 'true', 'none' or 'random'"),
        ("run.name=../other", "run.name = '../other': use letters, digits and _ . + -, with a letter, a "),
        ("run.name=", "run.name = '': use letters, digits and _ . + -, with"),
        ("evaluation.turn_limits=3,0", "evaluation.turn_limits.1 = 0: give at least 1"),
        (
            "evaluation.feedback=tru",
            "evaluation.feedback.0 = 'tru': use 'true', 'none' or 'random'; did you mean 'true'?",
        ),
        ("evaluation.feedback=[]", "evaluation.feedback = []: give at least 1"),
        (
            "parallel.dtype=bf16",
            "parallel.dtype = 'bf16': use 'float32' or 'bfloat16'; did you mean 'bfloat16'?",
        ),
        ("executor.cores=0-99", "executor.cores = '0-99': give a whole number"),
        ("rollout.overlap=yes", "rollout.overlap = 'yes': write true or false"),
        ("optimizer.lr=fast", "optimizer.lr = 'fast': give a number"),
        ("optimizer.lr=0", "optimizer.lr = 0: give more than 0"),
        ("evaluation.budgets=[{n=1}]", "evaluation.budgets.0.k is missing; give it beside the others"),
        ("evaluation.budgets=[3]", "evaluation.budgets.0 = 3: write a table of settings"),
        (
            "evaluation.budgets=[{n=1,k=3,temperature=1,top_p=1,topp=1}]",
            "unknown setting 'evaluation.budgets.0.topp'; did you mean 'evaluation.budgets.0.top_p'?",
        ),
    ],
)
def test_a_wrong_override_is_named_with_its_mend(tmp_path: Path, override: str, message: str) -> None:
    assert error_of(tmp_path, "", override).startswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run = 3", "run = 3: write a table of settings"),
        ("[model]\npath = 3", "model.path = 3: write text"),
        ("[evaluation]\nturn_limits = 3", "evaluation.turn_limits = 3: write a list, as in [1, 3]"),
        ("[run]\nsede = 1", "unknown setting 'run.sede'; did you mean 'run.seed'?"),
        ("[run\n", "run.toml is not TOML: "),
    ],
)
def test_a_wrong_file_is_named_with_its_mend(tmp_path: Path, text: str, message: str) -> None:
    assert message in error_of(tmp_path, text)


def test_an_override_of_a_value_that_is_no_section_is_refused(tmp_path: Path) -> None:
    assert error_of(tmp_path, "run = 3", "run.seed=1") == "override 'run.seed=1': 'run' is not a section"


def test_a_missing_run_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no run file '.*absent\.toml'; configs/ has examples"):
        load_config(tmp_path / "absent.toml")


def test_a_folder_is_no_run_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_config(tmp_path)


def test_settings_do_not_change(tmp_path: Path) -> None:
    config = load(tmp_path)
    with pytest.raises(ValidationError, match="frozen"):
        config.run.seed = 5


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("rollout.episodes_per_step=10", "ppo.updates_per_step=4"),
            "rollout.episodes_per_step = 10 is not a multiple of ppo.updates_per_step = 4; use 8",
        ),
        (
            ("rollout.episodes_per_step=2", "ppo.updates_per_step=4"),
            "rollout.episodes_per_step = 2 is not a multiple of ppo.updates_per_step = 4; use 4",
        ),
        (
            ("parallel.processes=3", "parallel.tensor=2"),
            "parallel.processes = 3 is not a multiple of parallel.tensor x parallel.pipeline x parallel.",
        ),
        (
            ("parallel.virtual_pipeline=2",),
            "parallel.virtual_pipeline = 2 interleaves the stages of a pipeline, and parallel.pipeline = 1; ",
        ),
        (
            ("parallel.sequence_parallel=true",),
            "parallel.sequence_parallel = true splits the tokens over tensor parallel ranks, and parallel.",
        ),
        (
            ("evaluation.turn_limits=3,3",),
            "evaluation.turn_limits names one of its values twice; name each once",
        ),
        (
            ("evaluation.budgets=[{n=5,k=3,temperature=0.2,top_p=1}]",),
            "evaluation.budgets: n = 5 submissions of k = 3 responses; n is at most k",
        ),
        (
            ("rollout.episodes_per_step=4", "ppo.updates_per_step=2", "parallel.processes=3"),
            "rollout.episodes_per_step / ppo.updates_per_step = 2 sequences an update cannot be shared by 3 ",
        ),
    ],
)
def test_numbers_that_do_not_fit_are_both_named(
    tmp_path: Path, overrides: tuple[str, ...], message: str
) -> None:
    assert error_of(tmp_path, "", *overrides).startswith(message)


def short_dialogs(*, training: int, evaluation: int) -> Config:
    rollout = RolloutConfig(
        max_prompt_tokens=20, turns=training, max_response_tokens=5, max_feedback_tokens=17
    )
    return Config(rollout=rollout, evaluation=EvaluationConfig(turns=evaluation))


def test_the_longest_dialog_counts_a_closing_token_before_each_feedback() -> None:
    assert longest_dialog(short_dialogs(training=3, evaluation=3)) == 20 + 3 * 5 + 2 * (17 + 1)


def test_the_longest_dialog_may_be_one_of_training_or_of_evaluation() -> None:
    longest = longest_dialog(short_dialogs(training=3, evaluation=3))
    assert longest_dialog(short_dialogs(training=1, evaluation=3)) == longest
    assert longest_dialog(short_dialogs(training=3, evaluation=1)) == longest


def test_a_context_of_exactly_the_longest_dialog_is_enough() -> None:
    config = short_dialogs(training=3, evaluation=3)
    check_context(config, 71)
    with pytest.raises(ConfigError, match=r"can grow to 71 tokens .* context holds 70; lower one of them"):
        check_context(config, 70)


def test_a_bare_word_on_the_command_line_is_read_as_the_settings_type(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        "",
        "rollout.feedback=true",
        "run.name=7",
        "executor.allow_missing=mount_namespace,landlock",
        "run.seed=3",
    )
    assert (config.rollout.feedback, config.run.name, config.run.seed) == ("true", "7", 3)
    assert config.executor.allow_missing == ("mount_namespace", "landlock")


def test_the_batch_arithmetic_is_described(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        "",
        *("run.steps=10", "rollout.episodes_per_step=24", "ppo.updates_per_step=2"),
        *("parallel.processes=6", "parallel.tensor=2"),
    )
    arithmetic = describe_arithmetic(config)
    assert arithmetic["data-parallel replicas"] == 3
    assert arithmetic["episodes of each sampler (at most)"] == 4
    assert arithmetic["sequences an update"] == 12
    assert arithmetic["sequences an update and replica (at most)"] == 4
    assert arithmetic["updates in all"] == 20
    assert arithmetic["episodes in all"] == 240


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda path: path.stem)
def test_a_shipped_run_file_loads(path: Path) -> None:
    assert describe_arithmetic(load_config(path))["updates in all"] >= 1
