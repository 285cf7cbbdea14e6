from __future__ import annotations

import io
import json
from pathlib import Path

from rich.console import Console

from rlef.config import Budget, Config, EvaluationConfig
from rlef.evaluation_folder import figures_of
from rlef.evaluation_page import matrix_table, render_page, write_page
from rlef.measurement import draws_of, measure
from tests.evaluation_examples import NO_CODE, PASSED, RAISED, WRONG, transcript
from tests.test_report import Page

EVALUATION = EvaluationConfig(
    budgets=(
        Budget(n=1, k=3, temperature=0.2, top_p=0.95),
        Budget(n=2, k=6, temperature=1.0, top_p=0.95),
    ),
    turn_limits=(1, 3, 5),
    feedback=("true", "none"),
    rollouts_per_problem=6,
    bootstrap_samples=20,
)
TRANSCRIPTS = [
    *[transcript(WRONG, PASSED, solved=True, problem="a")] * 6,
    *[transcript(RAISED, NO_CODE, WRONG, WRONG, WRONG, codes=["<b>", None, "c", "d", "e"])] * 6,
]


def figures(model: object = "embedded") -> dict:
    cells = measure(dict.fromkeys(draws_of(EVALUATION), TRANSCRIPTS), EVALUATION, seed=1)
    return json.loads(json.dumps(figures_of(cells, Config(evaluation=EVALUATION), {"model": model})))


def test_the_table_has_a_line_for_each_cell_and_a_dash_where_a_budget_pays_for_no_dialog() -> None:
    stream = io.StringIO()
    Console(file=stream, width=160).print(matrix_table(figures()))
    lines = [" ".join(line.split()) for line in stream.getvalue().splitlines()]
    cells = [line for line in lines if line.startswith("T ")]
    assert len(cells) == 12
    whole = "T 0.2, top-p 0.95 true 5 50.0 [50.0, 50.0] – – 50.0 0.0 "
    assert any(line.startswith(whole) and line.endswith(" 14 3.5") for line in cells)
    assert any(
        line.startswith("T 0.2, top-p 0.95 none 1 0.0 [0.0, 0.0] 0.0 [0.0, 0.0] – 0.0 – – – –")
        for line in cells
    )


def test_the_page_has_no_reference_to_the_outside_and_every_element_is_closed() -> None:
    text = render_page("<name>", figures())
    page = Page(text)
    assert page.open == []
    assert "http" not in text
    assert "@import" not in text
    assert "<name>" not in text
    assert "&lt;name&gt;" in text


def test_the_page_shows_curves_outcomes_and_transitions() -> None:
    text = render_page("run", figures(model={"name": "m", "url": "local"}))
    assert "m at local on 2 problems" in text
    assert text.count("<svg") == 2
    assert 'aria-label="Drawn at T 1, top-p 0.95"' in text
    assert "stroke: var(--series-2)" in text
    assert "<h3>no feedback, T 0.2, top-p 0.95</h3>" in text
    assert "from one turn's outcome (row) to the next one's" in text
    assert '<th scope="row">no code</th>' in text
    assert "<td>50.0 [50.0, 50.0]</td>" in text


def test_the_page_is_made_again_from_the_figures(tmp_path: Path) -> None:
    (tmp_path / "evaluation.json").write_text(json.dumps(figures()))
    text = write_page(tmp_path).read_text()
    assert write_page(tmp_path).read_text() == text
