import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from rlef.records import StepStats, TurnOutcome
from rlef.report import (
    DialogExample,
    Message,
    before_after_table,
    compare,
    read_dialogs,
    read_summary,
    render_report,
    save_dialogs,
    text_segments,
    write_report,
)
from rlef.telemetry import MetricsLog

OUTCOMES = tuple(outcome.value for outcome in TurnOutcome)


def figures(rate: float, *, single: float = 0.2, random: float = 0.1) -> dict[str, Any]:
    outcomes = [dict.fromkeys(OUTCOMES, 0) | {"passed": 1, "wrong_output": 3}]
    transitions = {"wrong_output": {"passed": 1, "exception": 2}}
    return {
        "1@1": 0.1,
        "1@3": rate,
        "single_turn_1@3": single,
        "random_feedback_1@3": random,
        "no_feedback_1@3": 0.15,
        "repair_rate": None,
        "identical_resubmission_rate": 0.5,
        "mean_reward": -0.4,
        "mean_response_tokens": 40.0,
        "problems": 4,
        "rollouts_per_problem": 1,
        "intervals": {"1@3": [rate - 0.05, rate + 0.05]},
        "conditions": {"true_feedback": {"outcomes": outcomes, "transitions": transitions}},
    }


def summary(start: float = 0.25, final: float | None = 0.5) -> dict[str, Any]:
    return {
        "start": figures(start),
        "final": None if final is None else figures(final),
        "seed": 1,
        "steps": 10,
        "seconds": 90.0,
        "versions": {"torch": "2", "rlef": None},
        "hardware": "2 x CPU",
    }


def dialog(
    phase: str, *, answer: str = "hello", solved: bool = False, condition: str = "true_feedback"
) -> DialogExample:
    return DialogExample(
        problem_id="p1",
        phase=phase,
        condition=condition,
        statement="Add the numbers.\nOne line.",
        messages=(
            Message(role="user", text="Add the numbers, please.", outcome=None),
            Message(role="assistant", text=answer, outcome="wrong_output"),
            Message(role="user", text="It failed.", outcome=None),
            Message(role="assistant", text=answer, outcome="passed" if solved else "exception"),
        ),
        solved=solved,
    )


def steps(count: int) -> list[StepStats]:
    return [
        StepStats(step=step, metrics={"solve_rate": step / 10, "kl": 0.01, "seconds/rollout": 2.0})
        for step in range(1, count + 1)
    ]


class Page(HTMLParser):
    """The elements of a page, and whether each is closed in its order."""

    void = frozenset({"meta", "br", "input", "link", "img", "hr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_a_change_is_a_ratio_and_where_the_start_is_not_positive_a_difference() -> None:
    rows = {row.label: row for row in compare(summary(start=0.25, final=0.5))}
    assert rows["1@3, true feedback"].change == "× 2.00"
    assert rows["mean reward"].change == "+0.00"
    assert rows["repair rate"].change == ""
    assert rows["repair rate"].value("final") == "-"


def test_the_budget_is_read_from_the_figures_names() -> None:
    single_turn = summary()
    for phase in ("start", "final"):
        single_turn[phase] = {name.replace("1@3", "1@5"): value for name, value in single_turn[phase].items()}
    assert compare(single_turn)[0].label == "1@5, true feedback"


def test_the_terminal_shows_both_phases_with_intervals() -> None:
    stream = io.StringIO()
    Console(file=stream, width=80).print(before_after_table(summary(start=0.25, final=0.5)))
    (line,) = [line for line in stream.getvalue().splitlines() if "true feedback" in line]
    assert re.split(r"\s{2,}", line.strip()) == [
        "1@3, true feedback",
        "25.0 % [20.0, 30.0]",
        "50.0 % [45.0, 55.0]",
        "× 2.00",
    ]
    assert all(len(line) <= 80 for line in stream.getvalue().splitlines())


def test_a_page_has_no_reference_to_the_outside_and_every_element_is_closed() -> None:
    text = render_report(
        "run", summary(), metrics=steps(3), dialogs=[dialog("start"), dialog("final", solved=True)]
    )
    page = Page(text)
    assert page.open == []
    assert "http" not in text
    assert "@import" not in text
    references = [value for _, name, value in page.attributes if name in ("src", "href", "xlink:href")]
    assert all(value is not None and value.startswith("#") for value in references)
    assert "url(" not in re.sub(r"url\(#\w+\)", "", text)


def test_identifiers_are_unique_and_every_reference_inside_the_page_has_its_target() -> None:
    text = render_report("run", summary(), metrics=steps(3), dialogs=[dialog("start")])
    page = Page(text)
    identifiers = [value for _, name, value in page.attributes if name == "id"]
    assert len(identifiers) == len(set(identifiers))
    targets = set(re.findall(r"url\(#([\w-]+)\)", text)) | {
        value[1:] for _, name, value in page.attributes if name == "xlink:href" and value
    }
    assert targets
    assert targets <= set(identifiers)


def test_curves_take_their_colours_from_the_page() -> None:
    text = render_report("run", summary(), metrics=steps(3), dialogs=[])
    assert "stroke: var(--series-1)" in text
    assert "#0303" not in text
    assert "#0101" not in text


@given(answer=st.text(alphabet=st.sampled_from("<>&\"'`/script\n python"), min_size=1))
def test_what_a_model_wrote_can_never_become_an_element(answer: str) -> None:
    plain = Page(render_report("run", summary(), metrics=[], dialogs=[dialog("start", answer="a")]))
    odd = Page(render_report("run", summary(), metrics=[], dialogs=[dialog("start", answer=answer)]))
    assert odd.open == []
    known = {(tag, name) for tag, name, _ in plain.attributes}
    assert {(tag, name) for tag, name, _ in odd.attributes} <= known


def test_a_dialog_shows_its_statement_once_and_each_turn_with_its_verdict() -> None:
    text = render_report("run", summary(), metrics=[], dialogs=[dialog("start", answer="my answer")])
    assert text.count("One line.") == 1
    assert "please" not in text
    assert text.count('<div class="prose">my answer</div>') == 2
    assert '<span class="badge bad">wrong output</span>' in text
    assert "It failed." in text


def test_dialogs_of_one_problem_stand_together_and_are_tagged_by_what_became_of_them() -> None:
    pairs = [dialog("final", solved=True), dialog("start"), dialog("start", condition="random_feedback")]
    text = render_report("run", summary(), metrics=[], dialogs=pairs)
    tags = re.findall(r'data-condition="(\w+)" data-tags="([^"]*)"', text)
    assert tags == [("true_feedback", "newly-solved repaired"), ("random_feedback", "unsolved")]
    assert text.index("<h3>start <span") < text.index("<h3>final <span")


def test_a_run_without_a_final_evaluation_still_has_a_page() -> None:
    text = render_report("run", summary(final=None), metrics=steps(1), dialogs=[])
    assert "has no final evaluation yet" in text
    assert "25.0 %" in text


def test_claims_are_made_from_the_final_figures() -> None:
    text = render_report("run", summary(start=0.25, final=0.5), metrics=[], dialogs=[])
    tiles = re.findall(r'tile"><b>([^<]*)</b>', text)
    assert tiles == ["2.00 ×", "2.50 ×", "-80%"]


def test_a_start_that_solves_nothing_divides_nothing() -> None:
    text = render_report("run", summary(start=0.0, final=0.5), metrics=[], dialogs=[])
    assert "1@3 from 0.0% to 50.0%" in text


def test_the_page_says_how_often_the_machine_failed_programs() -> None:
    def troubled(restarts: float, retries: float) -> str:
        counts = {"executor/restarts": restarts, "executor/retries": retries}
        metrics = [StepStats(step=step, metrics={"kl": 0.1} | counts) for step in (1, 2)]
        return render_report("run", summary(), metrics=metrics, dialogs=[])

    told = "executor workers replaced: 4, programs run again because of that: 2"
    assert told in troubled(2.0, 1.0)
    assert "workers replaced" not in troubled(0.0, 0.0)


def test_the_page_is_made_again_from_the_files_of_the_run(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(json.dumps(summary()))
    log = MetricsLog(tmp_path / "metrics.jsonl", completed_steps=0)
    for stats in steps(2):
        log.append(stats)
    save_dialogs(tmp_path / "dialogs.jsonl", "start", [dialog("start", answer="from the disk")])
    page = write_report(tmp_path)
    text = page.read_text()
    assert "from the disk" in text
    assert 'aria-label="Solve rate of training dialogs"' in text
    assert write_report(tmp_path).read_text() == text


def test_a_summary_alone_makes_a_page(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(json.dumps(summary()))
    assert "<svg" not in write_report(tmp_path).read_text()


def test_dialogs_of_a_phase_replace_earlier_ones_and_leave_the_other_phase(tmp_path: Path) -> None:
    path = tmp_path / "dialogs.jsonl"
    save_dialogs(path, "start", [dialog("start")])
    save_dialogs(path, "final", [dialog("final", answer="old")])
    save_dialogs(path, "final", [dialog("final", answer="new\u2028line")])
    assert read_dialogs(path) == [dialog("start"), dialog("final", answer="new\u2028line")]


@pytest.mark.parametrize("line", ["nonsense", "{}", '{"problem_id": "p"}', "[]"])
def test_a_line_that_is_no_dialog_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "dialogs.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(ValueError, match=r"dialogs\.jsonl, line 1: not a dialog; delete the line"):
        read_dialogs(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "summary.json is missing: name the folder of a run"),
        ("{", "summary.json is not JSON"),
        ("{}", "summary.json has no figures of the start"),
        ("[1]", "summary.json has no figures of the start"),
    ],
)
def test_a_summary_that_is_missing_or_not_ours_is_an_error_with_its_mend(
    tmp_path: Path, content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "summary.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_summary(tmp_path / "summary.json")


@pytest.mark.parametrize(
    ("text", "segments"),
    [
        ("words", [(False, "words")]),
        ("before\n```python\nx = 1\n```\nafter", [(False, "before"), (True, "x = 1"), (False, "after")]),
        ("```py\nunfinished", [(True, "unfinished")]),
        ("", []),
    ],
)
def test_a_message_is_cut_into_prose_and_programs(text: str, segments: list[tuple[bool, str]]) -> None:
    assert text_segments(text) == segments
