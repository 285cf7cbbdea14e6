"""Example dialogs before a problem's own, and the command that makes them of an evaluation."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from rlef.arithmetic import longest_dialog
from rlef.cli import main
from rlef.config import Config, ConfigError, RolloutConfig
from rlef.evaluation_folder import EvaluationFolder, examples_digest, figures_of, identity_of
from rlef.few_shot import ExampleDialog, ExampleMessage, read_examples, write_examples
from rlef.measurement import draws_of, measure
from rlef.ports import SamplingParams
from rlef.pretrained import model_folder
from rlef.problems import line_of, load
from rlef.prompts import Dialog, FailedTest, feedback_text, prompt_text
from rlef.records import Problem
from rlef.settings_file import load_config
from rlef.transcripts import Transcript
from rlef_sandbox import Test
from tests.evaluation_examples import PASSED, WRONG, transcript
from tests.test_prompts import Verdict, result

DOUBLES = "numbers = input().split()\nprint(2 * int(numbers[0]))\n"
PRINTS_THREE = "print(3)\n"
USER = '{"role": "user", "content": "x"}'


def example(problem: str = "p") -> ExampleDialog:
    texts = (prompt_text("double it"), "```python\nprint(3)\n```", "wrong", "```python\nprint(4)\n```")
    roles = ("user", "assistant") * 2
    messages = tuple(
        ExampleMessage.model_validate({"role": role, "content": text})
        for role, text in zip(roles, texts, strict=True)
    )
    return ExampleDialog(problem_id=problem, messages=messages)


def settings_with(path: Path, *examples: ExampleDialog, tokens: int = 400) -> RolloutConfig:
    write_examples(path / "examples.jsonl", examples)
    return RolloutConfig(few_shot=str(path / "examples.jsonl"), max_few_shot_tokens=tokens)


@given(st.text(min_size=1), st.text())
def test_a_file_gives_back_what_was_written_whatever_the_text(name: str, text: str) -> None:
    """Also line ends of Unicode, which JSON does not escape."""
    one = ExampleDialog(
        problem_id=name,
        messages=(ExampleMessage(role="user", content=text), ExampleMessage(role="assistant", content=text)),
    )
    with tempfile.TemporaryDirectory() as folder:
        write_examples(Path(folder) / "examples.jsonl", [one, one])
        assert read_examples(f"{folder}/examples.jsonl") == [one, one]


def test_examples_are_told_token_for_token_as_the_dialogs_that_they_were(tmp_path: Path) -> None:
    plain = Dialog.read(model_folder("embedded"), RolloutConfig())
    dialog = Dialog.read(model_folder("embedded"), settings_with(tmp_path, example(), example("q")))
    first, answer, told, second = (message.content for message in example().messages)
    assert first == prompt_text("double it")
    one = [
        *plain.prompt("double it"),
        *plain.response(answer),
        *plain.feedback(told),
        *plain.response(second),
    ]
    assert dialog.prompt("add one") == [*one, *one, *plain.prompt("add one")]


def test_only_the_first_example_begins_as_a_dialog_does(tmp_path: Path) -> None:
    settings = settings_with(tmp_path, example())
    (tmp_path / "dialog.json").write_text(
        json.dumps(
            {"first": "<|end|><|user|>", "user": "<|user|>", "assistant": "<|assistant|>", "end": "<|end|>"}
        )
    )
    (tmp_path / "tokenizer.json").write_bytes((model_folder("embedded") / "tokenizer.json").read_bytes())
    few, plain = (Dialog.read(tmp_path, each) for each in (settings, RolloutConfig()))
    ids = few.prompt("add one")
    assert ids[: len(plain.prompt("double it"))] == plain.prompt("double it")
    assert ids[-len(plain.prompt("add one")) + 1 :] == plain.prompt("add one")[1:]  # but for the opening
    assert ids.count(plain.end_token_id) == 3  # the opening's, and each response's


def test_what_was_told_is_the_problem_without_the_examples(tmp_path: Path) -> None:
    dialog = Dialog.read(model_folder("embedded"), settings_with(tmp_path, example()))
    assert dialog.told(dialog.prompt("add one")) == prompt_text("add one")
    assert dialog.told(dialog.feedback("wrong")) == "wrong"


def test_a_long_statement_is_cut_and_the_examples_stay(tmp_path: Path) -> None:
    settings = settings_with(tmp_path, example()).model_copy(update={"max_prompt_tokens": 64})
    short, long = (
        Dialog.read(model_folder("embedded"), settings).prompt(text) for text in ("add one", "word " * 500)
    )
    examples = len(short) - len(Dialog.read(model_folder("embedded"), RolloutConfig()).prompt("add one"))
    assert len(long) == examples + 64
    assert long[:examples] == short[:examples]


def test_examples_that_take_more_tokens_than_they_may_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"take \d+ tokens, and rollout\.max_few_shot_tokens = 20; raise it"
    ):
        Dialog.read(model_folder("embedded"), settings_with(tmp_path, example(), tokens=20))


def test_the_longest_dialog_counts_the_examples() -> None:
    with_room = Config(rollout=RolloutConfig(few_shot="x", max_few_shot_tokens=300))
    assert longest_dialog(with_room) == longest_dialog(Config()) + 300


@pytest.mark.parametrize("override", ["rollout.few_shot=x.jsonl", "rollout.max_few_shot_tokens=5"])
def test_a_file_without_room_and_room_without_a_file_are_refused(override: str) -> None:
    with pytest.raises(ConfigError, match="set both, a file of examples and their room, or neither"):
        load_config(Path("configs/tiny.toml"), [override])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no dialog"),
        ("{}\n", "line 1: problem_id: Field required"),
        (example().model_dump_json() + "\n[]\n", "line 2: "),
        (f'{{"problem_id": "p", "messages": [{USER}, {USER}]}}', "user and assistant in turns"),
    ],
)
def test_a_file_that_is_none_of_examples_is_named_with_its_line(
    tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "bad.jsonl").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_examples(str(tmp_path / "bad.jsonl"))


def test_a_missing_file_is_named() -> None:
    with pytest.raises(ConfigError, match=r"rollout.few_shot: 'nowhere.jsonl' cannot be read"):
        read_examples("nowhere.jsonl")


def test_an_example_of_a_problem_that_is_evaluated_is_refused(tmp_path: Path) -> None:
    (held_out, *_) = load(Config(), "eval")
    config = Config(rollout=settings_with(tmp_path, example(held_out.id)))
    with pytest.raises(ConfigError, match="would be shown for that problem itself"):
        load(config, "eval")


def test_other_examples_make_another_evaluation(tmp_path: Path) -> None:
    digests = {examples_digest(settings_with(tmp_path, example(name)).few_shot) for name in ("a", "b")}
    assert len({*digests, examples_digest("")}) == 3


def doubling(name: str) -> Problem:
    return Problem(
        id=name,
        statement="double it",
        public_tests=(Test("2\n", "4\n"),),
        private_tests=(Test("5\n", "10\n"),),
        time_limit_s=5.0,
        memory_limit_bytes=100_000_000,
        source="hand",
    )


PROBLEMS = [doubling(name) for name in ("first", "at once", "flaky", "late")]


def played() -> list[Transcript]:
    return [
        transcript(WRONG, WRONG, problem="first", number=0),
        transcript(PASSED, solved=True, problem="at once", number=1, codes=[DOUBLES]),
        transcript(
            WRONG, PASSED, solved=True, problem="flaky", number=2, codes=[DOUBLES, DOUBLES]
        ),  # now the first program passes
        transcript(WRONG, PASSED, solved=True, problem="late", number=3, codes=[PRINTS_THREE, DOUBLES]),
    ]


def evaluated(folder: Path) -> tuple[Path, Path]:
    """The folder of an evaluation of PROBLEMS, and the run file that names them."""
    (folder / "problems.jsonl").write_text("".join(map(line_of, PROBLEMS)))
    run_file = folder / "run.toml"
    run_file.write_text(
        f'[problems]\neval = "{folder}/problems.jsonl"\n[executor]\nworkers = 1\n'
        "[evaluation]\nrollouts_per_problem = 1\nturn_limits = [2]\nfeedback = ['true']\n"
        "budgets = [{n = 1, k = 2, temperature = 1.0, top_p = 1.0}]\n"
    )
    config = load_config(run_file)
    identity = identity_of(config, load(config, "eval"), weights="w")
    kept = EvaluationFolder(folder / "evaluation", identity)
    (draw,) = draws_of(config.evaluation)
    transcripts: list[Transcript] = []
    kept.complete(
        draw,
        PROBLEMS,
        transcripts,
        play=lambda *_, **__: played(),
        params=SamplingParams(temperature=1.0, top_p=1.0, max_tokens=5, seed=1),
        batch=4,
        note=lambda _: None,
    )
    cells = measure({draw: transcripts}, config.evaluation, seed=1)
    kept.write_figures(figures_of(cells, config, identity))
    return kept.path, run_file


def test_the_command_keeps_dialogs_that_feedback_led_to_a_solution(tmp_path: Path) -> None:
    """Of four: one failed, one needed no feedback, one is not judged again as it was, and one is."""
    folder, run_file = evaluated(tmp_path)
    output = tmp_path / "examples.jsonl"
    command = ["problems", "examples", str(run_file), str(folder), str(output), "--count"]
    refused = CliRunner().invoke(main, [*command, "2"])
    assert refused.exit_code == 2
    assert "has such dialogs of 1 problems, fewer than 2" in refused.stderr
    assert not output.exists()
    made = CliRunner().invoke(main, [*command, "1"])
    assert made.exit_code == 0, made.output
    (found,) = read_examples(str(output))
    failed = FailedTest(test=PROBLEMS[3].public_tests[0], result=result(Verdict.WRONG_OUTPUT, stdout="3\n"))
    assert found.problem_id == "late"
    assert [message.content for message in found.messages] == [
        prompt_text("double it"),
        f"```python\n{PRINTS_THREE}```",
        feedback_text([failed], max_test_characters=512),
        f"```python\n{DOUBLES}```",
    ]


def test_the_command_wants_the_problems_of_the_evaluation(tmp_path: Path) -> None:
    folder, run_file = evaluated(tmp_path)
    command = [
        "problems",
        "examples",
        str(run_file),
        str(folder),
        str(tmp_path / "x"),
        "problems.eval_size=3",
    ]
    others = CliRunner().invoke(main, [*command, "problems.eval=hidden_conventions:heldout"])
    assert others.exit_code == 2
    assert "does not name the problems that" in others.stderr
