"""An evaluation's matrix as a table for the terminal and as one `evaluation.html` that needs nothing beside
itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import markupsafe
from matplotlib.ticker import FixedLocator
from rich.table import Table

from rlef.charts import INK, SERIES, inline_svg, new_figure
from rlef.evaluation_folder import FIGURES_FILE, read_json
from rlef.files import write_text
from rlef.records import TurnOutcome
from rlef.report import page_template

PAGE_FILE = "evaluation.html"

_NONE = "–"  # of a rate over nothing, and of a budget that pays for no dialog


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    """A cell of the matrix, as text, and how its first columns tell it from the others."""

    way: str  # temperature and top-p
    feedback: str
    turns: str
    figures: tuple[str, ...]


def write_page(directory: Path) -> Path:
    """Make `evaluation.html` from the `evaluation.json` beside it."""
    path = directory / PAGE_FILE
    write_text(path, render_page(directory.resolve().name, read_json(directory / FIGURES_FILE)))
    return path


def render_page(name: str, figures: Mapping[str, Any]) -> str:
    """The page as one string without any reference to the outside."""
    cells: list[dict[str, Any]] = figures["cells"]
    headings, rows = _table(figures)
    longest = max(cell["turn_limit"] for cell in cells)
    return page_template("evaluation.html.jinja").render(
        name=name,
        model=_model_name(figures["identity"]),
        problems=cells[0]["problems"],
        headings=headings,
        rows=rows,
        charts=[_chart(way, group) for way, group in _by_way(cells).items()],
        details=[cell for cell in cells if cell["turn_limit"] == longest],
        outcome_order=[outcome.value for outcome in reversed(TurnOutcome)],
        kind=_kind,
        way=_way,
    )


def matrix_table(figures: Mapping[str, Any]) -> Table:
    """For the terminal."""
    headings, rows = _table(figures)
    caption = "solved and other shares in %; 95 % intervals in brackets"
    table = Table(caption=caption, box=None, padding=(0, 1))
    for heading in ("drawn at", "feedback"):
        table.add_column(heading, no_wrap=True)
    for heading in ("turns", *headings):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(row.way, row.feedback, row.turns, *row.figures)
    return table


def _table(figures: Mapping[str, Any]) -> tuple[list[str], list[_Row]]:
    """Headings of the figures, and a row per cell."""
    budgets = [f"{budget['n']}@{budget['k']}" for budget in figures["evaluation"]["budgets"]]
    headings = ["one dialog", *budgets, "repaired", "same again", "edit", "tokens a solve", "s a solve"]
    rows = [
        _Row(
            way=_way(cell),
            feedback=cell["feedback"],
            turns=str(cell["turn_limit"]),
            figures=(
                _interval(cell["solve_rates"].get(f"1@{cell['turn_limit']}")),
                *(_interval(cell["solve_rates"].get(budget)) for budget in budgets),
                _share(cell["repair_rate"]),
                _share(cell["identical_resubmission_rate"]),
                _number(cell["edit_size"], ".2f"),
                _number(cell["response_tokens_per_solve"], ",.0f"),
                _number(cell["seconds_per_solve"], ",.1f"),
            ),
        )
        for cell in figures["cells"]
    ]
    return headings, rows


def _by_way(cells: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for cell in cells:
        groups.setdefault(_way(cell), []).append(cell)
    return groups


def _chart(way: str, cells: Sequence[dict[str, Any]]) -> tuple[str, markupsafe.Markup]:
    """(title, inline SVG): what one dialog solves by the turn limit, a curve for each kind of feedback."""
    figure, axes = new_figure("turn limit", "share solved by one dialog")
    for place, feedback in enumerate(dict.fromkeys(cell["feedback"] for cell in cells)):
        points = sorted(
            (cell["turn_limit"], cell["solve_rates"][f"1@{cell['turn_limit']}"])
            for cell in cells
            if cell["feedback"] == feedback
        )
        limits = [limit for limit, _ in points]
        axes.plot(
            limits,
            [rate["value"] for _, rate in points],
            color=SERIES[place],
            linewidth=2,
            marker="o",
            markersize=4,
            label=_kind(feedback),
        )
        low, high = ([rate[bound] for _, rate in points] for bound in ("low", "high"))
        axes.fill_between(limits, low, high, color=SERIES[place], alpha=0.15, linewidth=0)
        axes.xaxis.set_major_locator(FixedLocator(limits))
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=9, labelcolor=INK)
    title = f"Drawn at {way}"
    return title, inline_svg(figure, title)


def _model_name(identity: Mapping[str, Any]) -> str:
    model = identity["model"]
    return f"{model['name']} at {model['url']}" if isinstance(model, dict) else str(model)


def _kind(feedback: str) -> str:
    return "no feedback" if feedback == "none" else f"{feedback} feedback"


def _way(cell: Mapping[str, Any]) -> str:
    return f"T {cell['temperature']:g}, top-p {cell['top_p']:g}"


def _interval(estimate: Mapping[str, float] | None) -> str:
    if estimate is None:
        return _NONE
    value, low, high = (100 * estimate[name] for name in ("value", "low", "high"))
    return f"{value:.1f} [{low:.1f}, {high:.1f}]"


def _share(value: float | None) -> str:
    return _NONE if value is None else f"{100 * value:.1f}"


def _number(value: float | None, form: str) -> str:
    return _NONE if value is None else format(value, form)
