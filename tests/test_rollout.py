"""Episodes with a policy that follows a script, the real tokenizer and the real executor."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from threading import Thread
from typing import Protocol

import pytest
from torch import Tensor

from rlef.config import FeedbackKind, RolloutConfig
from rlef.ports import Request, Response, SamplingParams
from rlef.pretrained import model_folder
from rlef.prompts import Dialog
from rlef.records import Assertion, Episode, Expression, Problem, ProblemTest, TurnOutcome
from rlef.rollout import Collection, collect
from rlef.streaming import collect_overlapped
from rlef_sandbox import Call, Executor, SandboxFault, Test
from tests.sandbox.processes import descendants, wait_until

SETTINGS = RolloutConfig()
PARAMS = SamplingParams(temperature=1.0, top_p=1.0, max_tokens=99, seed=0)
DOUBLE = "```python\nprint(2 * int(input()))\n```"
SQUARE = "```python\nprint(int(input()) ** 2)\n```"
PLUS_TWO = "```python\nprint(int(input()) + 2)\n```"


def problem(name: str = "double") -> Problem:
    """4 is the double and the square of 2, and also 2 + 2; only the private test tells."""
    return Problem(
        id=name,
        statement=f"Print the {name} of the number.",
        public_tests=(Test("2\n", "4\n"), Test("0\n", "0\n")),
        private_tests=(Test("3\n", "6\n"), Test("5\n", "10\n")),
        time_limit_s=2.0,
        memory_limit_bytes=1 << 28,
        source="test",
    )


class Script:
    """`ports.Sampler` that answers each dialog with its next line, and remembers what it was asked."""

    def __init__(self, dialog: Dialog, *lines: Sequence[str], finish: str = "stop") -> None:
        self._dialog = dialog
        self._lines = {number: iter(texts) for number, texts in enumerate(lines)}
        self._finish = finish
        self.asked: list[list[int]] = []
        self._submitted: list[tuple[int, Response]] = []

    def generate(self, requests: Sequence[Request], params: SamplingParams) -> list[Response]:
        assert params is PARAMS
        return [self._answer(request) for request in requests]

    def submit(self, request: Request, params: SamplingParams) -> None:
        assert params is PARAMS
        self._submitted.append((request.stream, self._answer(request)))

    def step(self) -> list[tuple[int, Response]]:
        finished, self._submitted = self._submitted, []
        return finished

    def abort(self) -> list[tuple[int, Response]]:
        return self.step()

    def push(self, named_weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        raise AssertionError("a script has no weights")

    def _answer(self, request: Request) -> Response:
        self.asked.append(list(request.token_ids))
        ids = self._dialog.response(next(self._lines[request.stream]))
        if self._finish == "length":
            ids = ids[:-1]
        logprobs = [-0.5] * len(ids)
        return Response(token_ids=ids, logprobs=logprobs, versions=[4] * len(ids), finish_reason=self._finish)


@pytest.fixture(scope="module")
def dialog() -> Dialog:
    return Dialog.read(model_folder("embedded"), SETTINGS)


@pytest.fixture(scope="module")
def executor() -> Iterator[Executor]:
    with Executor(workers=1) as executor:
        yield executor


class Run(Protocol):
    """Collects an episode for each of `lines`."""

    def __call__(
        self,
        *lines: Sequence[str],
        feedback: FeedbackKind = "true",
        problems: Sequence[Problem] | None = None,
        finish: str = "stop",
        turns: int = 3,
    ) -> tuple[Collection, Script]: ...


def runner(collector: Callable[..., Collection], dialog: Dialog, executor: Executor) -> Run:
    def run(
        *lines: Sequence[str],
        feedback: FeedbackKind = "true",
        problems: Sequence[Problem] | None = None,
        finish: str = "stop",
        turns: int = 3,
    ) -> tuple[Collection, Script]:
        script = Script(dialog, *lines, finish=finish)
        collection = collector(
            problems or [problem(f"double{number}") for number in range(len(lines))],
            numbers=range(len(lines)),
            sampler=script,
            executor=executor,
            dialog=dialog,
            settings=SETTINGS,
            params=PARAMS,
            turns=turns,
            feedback=feedback,
        )
        return collection, script

    return run


@pytest.fixture(params=[collect, collect_overlapped], ids=["in_lockstep", "overlapped"])
def run(request: pytest.FixtureRequest, dialog: Dialog, executor: Executor) -> Run:
    return runner(request.param, dialog, executor)


def outcomes(episode: Episode) -> list[TurnOutcome]:
    return [turn.outcome for turn in episode.turns]


def test_an_episode_ends_when_the_public_tests_pass(run: Run, dialog: Dialog) -> None:
    (episode,) = run([PLUS_TWO, DOUBLE])[0].episodes
    assert outcomes(episode) == [TurnOutcome.WRONG_OUTPUT, TurnOutcome.PASSED]
    assert episode.solved


KINDS_OF_TESTS: dict[str, tuple[ProblemTest, ProblemTest, str]] = {
    "calls": (Call([2], 4), Call([3], 6), "f"),
    "expressions": (Expression("f(2)", "4"), Expression("f(3)", "6"), ""),
    "assertions": (Assertion("assert f(2) == 4"), Assertion("assert f(3) == 6"), ""),
}


@pytest.mark.parametrize("kind", KINDS_OF_TESTS)
def test_an_episode_is_judged_by_every_kind_of_test(run: Run, dialog: Dialog, kind: str) -> None:
    public, private, function = KINDS_OF_TESTS[kind]
    asked = replace(problem(), public_tests=(public,), private_tests=(private,), function=function)
    right, square, wrong = (f"```python\ndef f(n): return {value}\n```" for value in ("2 * n", "n * n", "n"))
    collection, script = run([wrong, right], problems=[asked])
    assert (collection.episodes[0].solved, collection.tests_run) == (True, 3)
    told = dialog.decode(script.asked[1])
    assert "Your code failed these tests:" in told
    assert "- input:\n" in told
    assert not run([square], problems=[asked], turns=1)[0].episodes[0].solved


def test_passing_the_public_tests_is_not_solving(run: Run, dialog: Dialog) -> None:
    (episode,) = run([SQUARE])[0].episodes
    assert outcomes(episode) == [TurnOutcome.PASSED]
    assert episode.passed_public
    assert not episode.solved


def test_the_turn_limit_ends_an_episode_that_never_passes(run: Run, dialog: Dialog) -> None:
    (episode,) = run([PLUS_TWO] * 3)[0].episodes
    assert outcomes(episode) == [TurnOutcome.WRONG_OUTPUT] * 3
    assert not episode.solved


def test_a_response_without_code_consumes_its_turn_and_is_told_so(run: Run, dialog: Dialog) -> None:
    collection, script = run(["no idea", DOUBLE])
    (episode,) = collection.episodes
    assert outcomes(episode) == [TurnOutcome.NO_CODE, TurnOutcome.PASSED]
    assert episode.turns[0].code is None
    assert "No program could be found" in dialog.decode(script.asked[1])


def test_feedback_lists_the_failing_test_and_no_passing_one(run: Run, dialog: Dialog) -> None:
    _, script = run([PLUS_TWO, DOUBLE])
    told = dialog.decode(script.asked[1])
    assert "- input:\n0\nexpected output:\n0\nyour output:\n2" in told
    assert told.count("- input:") == 1


def test_private_tests_are_never_shown(run: Run, dialog: Dialog) -> None:
    _, script = run([PLUS_TWO] * 3)
    assert all("10" not in dialog.decode(asked) for asked in script.asked)


def test_token_ids_are_one_growing_list(run: Run, dialog: Dialog) -> None:
    collection, script = run([PLUS_TWO, "no idea", DOUBLE])
    (episode,) = collection.episodes
    for asked, turn in zip(script.asked, episode.turns, strict=True):
        assert episode.token_ids[: turn.start] == asked
    lists = (episode.token_ids, episode.sampled, episode.logprobs, episode.versions)
    assert len({len(values) for values in lists}) == 1


def test_only_response_tokens_are_marked_as_sampled(run: Run, dialog: Dialog) -> None:
    (episode,) = run([PLUS_TWO, DOUBLE])[0].episodes
    inside = {index for turn in episode.turns for index in range(turn.start, turn.end)}
    assert {index for index, sampled in enumerate(episode.sampled) if sampled} == inside
    assert all(
        (logprob == -0.5) == sampled
        for logprob, sampled in zip(episode.logprobs, episode.sampled, strict=True)
    )
    assert all(
        (version == 4) == sampled for version, sampled in zip(episode.versions, episode.sampled, strict=True)
    )


def test_a_response_cut_at_its_length_is_closed_by_us_not_by_the_policy(run: Run, dialog: Dialog) -> None:
    (episode,) = run([PLUS_TWO, DOUBLE], finish="length")[0].episodes
    end = episode.turns[0].end
    assert episode.token_ids[end] == dialog.end_token_id
    assert not episode.sampled[end]


def test_without_feedback_only_the_failure_is_told(run: Run, dialog: Dialog) -> None:
    _, script = run([PLUS_TWO, DOUBLE], feedback="none")
    assert "Your code failed." in dialog.decode(script.asked[1])
    assert "- input:" not in dialog.decode(script.asked[1])


def test_random_feedback_is_that_of_another_problem(dialog: Dialog, executor: Executor) -> None:
    run = runner(collect, dialog, executor)
    other = Problem(
        id="other",
        statement="Print the number.",
        public_tests=(Test("7\n", "7\n"),),
        private_tests=(Test("8\n", "8\n"),),
        time_limit_s=2.0,
        memory_limit_bytes=1 << 28,
        source="test",
    )
    lines = [PLUS_TWO, DOUBLE], [DOUBLE, PLUS_TWO]
    collection, script = run(*lines, feedback="random", problems=[problem(), other], turns=2)
    assert "- input:\n7\nexpected output:\n7\nyour output:\n14" in dialog.decode(script.asked[2])
    assert "- input:\n0\nexpected output:\n0\nyour output:\n2" in dialog.decode(script.asked[3])
    assert [episode.solved for episode in collection.episodes] == [True, False]


def test_random_feedback_without_another_failure_tells_only_the_failure(
    dialog: Dialog, executor: Executor
) -> None:
    run = runner(collect, dialog, executor)
    _, script = run([PLUS_TWO, DOUBLE], feedback="random")
    assert "- input:" not in dialog.decode(script.asked[1])


def test_tests_run_counts_the_private_ones_up_to_the_first_failure(run: Run) -> None:
    assert run([DOUBLE])[0].tests_run == 2 + 2
    assert run([SQUARE])[0].tests_run == 2 + 1
    assert run(["no idea"], turns=1)[0].tests_run == 0


def test_a_fault_of_the_sandbox_is_raised_and_not_scored(dialog: Dialog) -> None:
    closed = Executor(workers=1)
    closed.close()
    for collector in (collect, collect_overlapped):
        with pytest.raises(SandboxFault):
            runner(collector, dialog, closed)([DOUBLE])


@pytest.mark.parametrize("collector", [collect, collect_overlapped])
def test_workers_that_are_stopped_and_killed_hold_a_step_up_for_a_while_and_change_no_verdict(
    dialog: Dialog, collector: Callable[..., Collection]
) -> None:
    program = "import time\nnumber = int(input())\ntime.sleep(2 * (number == 2))\nprint({} * number)"
    lines = [[f"```python\n{program.format(factor)}\n```"] for factor in ("2", "number")]
    with Executor(workers=2, patience_s=2.0) as executor:

        def hurt() -> None:
            stopped, killed = executor.worker_pids()
            wait_until(lambda: bool(descendants(stopped) and descendants(killed)), patience_s=60.0)
            os.kill(stopped, signal.SIGSTOP)
            os.kill(killed, signal.SIGKILL)

        hurting = Thread(target=hurt)
        hurting.start()
        collection, _ = runner(collector, dialog, executor)(*lines)
        hurting.join()
    assert [episode.solved for episode in collection.episodes] == [True, False]
    assert [episode.turns[0].outcome for episode in collection.episodes] == [TurnOutcome.PASSED] * 2
    assert (collection.tally.restarts, collection.tally.retries) == (2, 2)


def test_random_feedback_cannot_be_overlapped(dialog: Dialog, executor: Executor) -> None:
    with pytest.raises(ValueError, match="lockstep"):
        runner(collect_overlapped, dialog, executor)([DOUBLE], feedback="random")


def test_the_time_of_a_turn_is_shared_by_those_who_take_it(dialog: Dialog, executor: Executor) -> None:
    lines = [PLUS_TWO, SQUARE], [PLUS_TWO, PLUS_TWO], [DOUBLE]
    episodes = runner(collect, dialog, executor)(*lines, turns=2)[0].episodes
    first, second = ([turn.seconds for turn in episode.turns] for episode in episodes[:2])
    assert first[0] == second[0] > 0
    assert first[1] > second[1] > 0  # what passes is judged on the private tests, too
    assert episodes[2].turns[0].seconds > first[0]
