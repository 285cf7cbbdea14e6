"""`rlef eval --episodes` and `rlef compare`, with the real executor, sampler and a server of our own."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from rlef import hidden_conventions
from rlef.cli import main
from rlef.config import FeedbackKind
from rlef.ports import SamplingParams
from rlef.pretrained import model_folder, read_pretrained
from rlef.prompts import Dialog, prompt_text
from rlef.records import Episode
from rlef.rollout import collect
from rlef.torch_sampler import TorchSampler
from rlef.transcripts import Transcript, of_episode, within
from rlef_sandbox import Executor
from tests.chat_servers import Answer, completion, serving
from tests.small_runs import run_file, small_config

SMALL = (
    "evaluation.budgets=[{n=1,k=2,temperature=1.0,top_p=1.0}]",
    "evaluation.turn_limits=1,2",
    "evaluation.rollouts_per_problem=3",
)


def rlef(*arguments: str) -> Result:
    return CliRunner(env={"COLUMNS": "160"}).invoke(main, list(arguments))


def evaluated(folder: Path, episodes: Path, *more: str) -> Result:
    return rlef("eval", str(run_file(folder)), *SMALL, "--episodes", str(episodes), *more)


def test_an_evaluation_is_kept_made_again_without_its_model_speaking_and_compared(
    tmp_path: Path, random_model: Path
) -> None:
    model = f"model.path={random_model}"
    result = evaluated(tmp_path, tmp_path / "a", model, "--output", str(tmp_path / "figures.json"))
    assert result.exit_code == 0, result.output
    assert "true-temperature-1-top-p-1: 0 of 6 dialogs" in result.output
    assert "T 1, top-p 1" in result.output
    figures = (tmp_path / "a" / "evaluation.json").read_text()
    assert json.loads((tmp_path / "figures.json").read_text()) == json.loads(figures)
    cells = [(cell["feedback"], cell["turn_limit"]) for cell in json.loads(figures)["cells"]]
    assert cells == [(kind, limit) for kind in ("true", "none", "random") for limit in (1, 2)]
    assert (tmp_path / "a" / "evaluation.html").exists()

    again = evaluated(tmp_path, tmp_path / "a", model)
    assert again.exit_code == 0, again.output
    assert "dialogs" not in again.output
    assert (tmp_path / "a" / "evaluation.json").read_text() == figures

    output = tmp_path / "differences.json"
    compared = rlef("compare", str(tmp_path / "a"), str(tmp_path / "a"), "--output", str(output))
    assert compared.exit_code == 0, compared.output
    assert "only B solves" in compared.output
    rows = json.loads(output.read_text())
    assert [row["difference"] for row in rows] == [{"value": 0.0, "low": 0.0, "high": 0.0}] * len(rows)

    other = evaluated(tmp_path, tmp_path / "a", model, "run.seed=9")
    assert (other.exit_code, "holds dialogs whose seed is 1, not 9" in other.output) == (2, True)


def test_a_served_model_goes_on_after_its_server_has_failed(tmp_path: Path) -> None:
    problems = hidden_conventions.generate("heldout", seed=0, size=2)
    solutions = {prompt_text(problem.statement): problem.solutions[0] for problem in problems}
    broken = True

    def answer(body: dict, before: int) -> Answer:
        if broken and before >= 8:
            return Answer("gone", status=500, headers={"Retry-After-Ms": "1"})
        first, *rest = body["messages"]
        solution = f"```python\n{solutions[first['content']]}\n```"
        return completion(solution if rest else "I do not know.")

    more = ("--model", "m", "server.retries=1", "server.concurrency=1")
    with serving(answer) as served:
        stopped = evaluated(tmp_path, tmp_path / "a", "--server", served.url, *more)
        assert stopped.exit_code == 1, stopped.output
        assert f"rlef: error: {served.url}/chat/completions answered with status 500" in stopped.output
        assert "the same command goes on from here" in stopped.output
        kept = (tmp_path / "a" / "transcripts" / "true-temperature-1-top-p-1.jsonl").read_text()
        assert len(kept.splitlines()) == 4
        broken = False
        result = evaluated(tmp_path, tmp_path / "a", "--server", served.url, *more)
    assert result.exit_code == 0, result.output
    assert "true-temperature-1-top-p-1: 4 of 6 dialogs" in result.output
    figures = json.loads((tmp_path / "a" / "evaluation.json").read_text())
    assert figures["identity"]["model"] == {"url": served.url, "name": "m"}
    for cell in figures["cells"]:
        solved = cell["turn_limit"] == 2
        assert cell["solve_rates"]["1@2"]["value"] == float(solved)
        assert cell["repair_rate"] == float(solved)
        assert cell["response_tokens_per_solve"] == (10.0 if solved else None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--server", "http://127.0.0.1:1/v1", "--model", "m"), "name one by --episodes FOLDER"),
        (("--server", "127.0.0.1:1", "--episodes", "{folder}"), "server.url = '127.0.0.1:1': give the whole"),
        (("--server", "http://a/v1", "--episodes", "{folder}"), "server.model is empty"),
        (
            ("--episodes", "{folder}", "evaluation.turn_limits=1,30"),
            "a dialog can grow to 4541 tokens",
        ),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_anything_starts(
    tmp_path: Path, random_model: Path, arguments: tuple[str, ...], message: str
) -> None:
    given = [word.format(folder=tmp_path / "a") for word in arguments]
    result = rlef("eval", str(run_file(tmp_path)), f"model.path={random_model}", *given)
    assert (result.exit_code, message in result.output) == (2, True), result.output
    assert not (tmp_path / "a").exists()


def test_a_folder_that_is_no_evaluation_is_not_compared(tmp_path: Path) -> None:
    result = rlef("compare", str(tmp_path), str(tmp_path))
    message = f"rlef: error: {tmp_path / 'evaluation.json'} is missing: name the folder of an evaluation"
    assert result.exit_code == 2
    assert result.output.startswith(message)


def without_seconds(episode: Episode) -> Episode:
    return replace(episode, turns=tuple(replace(turn, seconds=0.0) for turn in episode.turns))


def test_dialogs_with_a_lower_limit_are_the_beginnings_of_those_with_a_higher_one(tmp_path: Path) -> None:
    """What `within` takes for granted, with the embedded model and each kind of feedback."""
    config = small_config(tmp_path, "rollout.max_response_tokens=48")
    folder = model_folder("embedded")
    shape, weights = read_pretrained(folder)
    dialog = Dialog.read(folder, config.rollout)
    problems = list(hidden_conventions.generate("heldout", seed=0, size=6))

    def rolled_out(turns: int, feedback: FeedbackKind) -> list[Transcript]:
        episodes = collect(
            problems,
            numbers=range(len(problems)),
            sampler=sampler,
            executor=executor,
            dialog=dialog,
            settings=config.rollout,
            params=SamplingParams(temperature=1.0, top_p=1.0, max_tokens=48, seed=5),
            turns=turns,
            feedback=feedback,
        ).episodes
        return [of_episode(without_seconds(episode), dialog) for episode in episodes]

    with (
        closing(TorchSampler(shape, end_token_id=dialog.end_token_id, slots=8)) as sampler,
        Executor(workers=1) as executor,
    ):
        sampler.push(weights.items(), version=0)
        for feedback in ("true", "none", "random"):
            longest = rolled_out(3, feedback)
            assert any(len(found.turns) == 3 for found in longest)
            for turns in (1, 2):
                assert [within(found, turns=turns) for found in longest] == rolled_out(turns, feedback)
