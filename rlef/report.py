"""What a run has to show: a table for the terminal, and one `report.html` that needs nothing beside itself.

The page is made from three files in the run's folder, so that it can be made again at any time:
`summary.json`, `metrics.jsonl` and `dialogs.jsonl`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import markupsafe
from matplotlib.axes import Axes
from rich.table import Table

from rlef.charts import INK, SERIES, inline_svg, new_figure
from rlef.files import write_text
from rlef.records import StepStats, TurnOutcome
from rlef.telemetry import BETWEEN_STEPS, METRICS_FILE, SECONDS, executor_trouble, read_metrics

SUMMARY_FILE = "summary.json"
DIALOGS_FILE = "dialogs.jsonl"
REPORT_FILE = "report.html"
PHASES = ("start", "final")

_BUDGET = r"1@\d+"


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One message of a dialog, as text."""

    role: str  # "user" or "assistant"
    text: str
    outcome: str | None  # value of a TurnOutcome; None for the user's messages


@dataclass(frozen=True, slots=True, kw_only=True)
class DialogExample:
    """A dialog for people to read."""

    problem_id: str
    phase: str  # "start" or "final"
    condition: str
    statement: str
    messages: tuple[Message, ...]
    solved: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A figure of one phase; `low` and `high` bound its 95 % interval, where there is one."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One row of the before/after table. A phase that has no such figure is None."""

    label: str
    is_share: bool  # shown in percent
    start: Measured | None
    final: Measured | None

    @property
    def change(self) -> str:
        if self.start is None or self.final is None:
            return ""
        if self.start.value > 0:
            return f"× {self.final.value / self.start.value:.2f}"
        return f"{self.final.value - self.start.value:+.2f}"

    def value(self, phase: str) -> str:
        figure = self._of(phase)
        if figure is None:
            return "-"
        return self._number(figure.value) + (" %" if self.is_share else "")

    def interval(self, phase: str) -> str:
        figure = self._of(phase)
        if figure is None or figure.low is None or figure.high is None:
            return ""
        return f"[{self._number(figure.low)}, {self._number(figure.high)}]"

    def _of(self, phase: str) -> Measured | None:
        return self.start if phase == "start" else self.final

    def _number(self, value: float) -> str:
        return f"{100 * value:.1f}" if self.is_share else f"{value:.2f}"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Chart:
    title: str
    metric: str
    unit: str


_CHARTS = (
    _Chart(title="Solve rate of training dialogs", metric="solve_rate", unit="share solved"),
    _Chart(title="Reward", metric="reward", unit="per dialog"),
    _Chart(title="KL to the start model", metric="kl", unit="mean log-ratio of a token"),
    _Chart(title="Response length", metric="response_tokens", unit="tokens"),
    _Chart(title="Repair rate", metric="repair_rate", unit="of failed first turns"),
    _Chart(title="Policy loss", metric="policy/loss", unit=""),
    _Chart(title="Value loss", metric="value/loss", unit=""),
    _Chart(title="Entropy", metric="policy/entropy", unit="nats a token"),
    _Chart(title="Longest program", metric="executor/longest_s", unit="seconds"),
)


def write_report(directory: Path) -> Path:
    """Make `report.html` from a run's folder. Curves and dialogs may be missing, the summary may not.

    Raises:
        ValueError: there is no summary, or a file is not what this program writes.
    """
    summary = read_summary(directory / SUMMARY_FILE)
    metrics, dialogs = directory / METRICS_FILE, directory / DIALOGS_FILE
    page = render_report(
        directory.resolve().name,
        summary,
        metrics=read_metrics(metrics) if metrics.exists() else [],
        dialogs=read_dialogs(dialogs) if dialogs.exists() else [],
    )
    path = directory / REPORT_FILE
    write_text(path, page)
    return path


def render_report(
    name: str, summary: Mapping[str, Any], *, metrics: Sequence[StepStats], dialogs: Sequence[DialogExample]
) -> str:
    """The page as one string without any reference to the outside."""
    return page_template("report.html.jinja").render(
        name=name,
        summary=summary,
        budget=_budget(summary),
        comparisons=compare(summary),
        claims=_claims(summary),
        charts=_charts(metrics),
        trouble=executor_trouble(metrics),
        outcomes=_outcome_tables(summary),
        outcome_order=[outcome.value for outcome in reversed(TurnOutcome)],
        pairs=_pair(dialogs),
        phases=[phase for phase in PHASES if summary.get(phase)],
    )


def compare(summary: Mapping[str, Any]) -> list[Comparison]:
    """Start against final, in the order in which they are told."""
    budget = _budget(summary)
    shares = {
        budget: f"{budget}, true feedback",
        f"random_feedback_{budget}": f"{budget}, random feedback",
        f"no_feedback_{budget}": f"{budget}, no feedback",
        f"single_turn_{budget}": f"{budget}, single responses",
        "1@1": "1@1, first response",
        "repair_rate": "repair rate",
        "identical_resubmission_rate": "identical resubmissions",
    }
    numbers = {"mean_reward": "mean reward", "mean_response_tokens": "tokens per response"}
    return [
        Comparison(
            label=label,
            is_share=key in shares,
            start=_measured(summary, "start", key),
            final=_measured(summary, "final", key),
        )
        for key, label in (shares | numbers).items()
    ]


def before_after_table(summary: Mapping[str, Any]) -> Table:
    """The same for the terminal."""
    table = Table(caption="held-out problems; 95 % intervals in brackets", box=None, padding=(0, 1))
    table.add_column("", no_wrap=True)
    for heading in ("start", "final", "change"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in compare(summary):
        figures = (f"{row.value(phase)} {row.interval(phase)}".strip() for phase in PHASES)
        table.add_row(row.label, *figures, row.change)
    return table


def read_summary(path: Path) -> dict[str, Any]:
    """Raises ValueError if it is missing or has no figures of the start; the message names the mend."""
    try:
        summary: Any = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(
            f"{path} is missing: name the folder of a run that has evaluated its start"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): evaluate the run again") from None
    start = summary.get("start") if isinstance(summary, dict) else None
    if not isinstance(start, dict) or not any(re.fullmatch(_BUDGET, name) for name in start):
        raise ValueError(f"{path} has no figures of the start: evaluate the run again")
    return dict(summary)


def save_dialogs(path: Path, phase: str, examples: Sequence[DialogExample]) -> None:
    """Put the examples of `phase` into `dialogs.jsonl`, in place of earlier ones of the same phase."""
    others = [example for example in read_dialogs(path) if example.phase != phase] if path.exists() else []
    lines = [json.dumps(asdict(example), ensure_ascii=False) + "\n" for example in (*others, *examples)]
    write_text(path, "".join(lines))


def read_dialogs(path: Path) -> list[DialogExample]:
    """Raises ValueError for a line that is not one of ours; the message names it."""
    examples: list[DialogExample] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], start=1):
        try:
            example = DialogExample(**json.loads(line))
            messages = tuple(Message(**message) for message in example.messages)  # type: ignore[arg-type]
        except (ValueError, TypeError):
            raise ValueError(f"{path}, line {number}: not a dialog; delete the line") from None
        examples.append(replace(example, messages=messages))
    return examples


def text_segments(text: str) -> list[tuple[bool, str]]:
    """A message cut into prose and fenced programs: (is a program, text)."""
    pieces = re.split(r"```(?:\w+)?\n(.*?)(?:```|\Z)", text, flags=re.DOTALL)
    return [(place % 2 == 1, piece.strip("\n")) for place, piece in enumerate(pieces) if piece.strip()]


@cache
def page_template(name: str) -> jinja2.Template:
    """A page of this package; what it shows is escaped, and what it lacks is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["segments"] = text_segments
    environment.filters["words"] = lambda value: value.replace("_", " ")
    return environment.get_template(name)


def _budget(summary: Mapping[str, Any]) -> str:
    """The headline figure's name, 1@turns."""
    names: list[str] = [name for name in summary["start"] if re.fullmatch(_BUDGET, name)]
    return max(names, key=lambda name: int(name[2:]))


def _measured(summary: Mapping[str, Any], phase: str, key: str) -> Measured | None:
    figures = summary.get(phase) or {}
    if figures.get(key) is None:
        return None
    low, high = figures.get("intervals", {}).get(key, (None, None))
    return Measured(value=figures[key], low=low, high=high)


def _claims(summary: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """What the run is to show: (figure, what it is, whence). Empty without a final evaluation."""
    final = summary.get("final")
    if not final:
        return []
    budget = _budget(summary)
    start_rate, rate = summary["start"][budget], final[budget]
    single, random = final[f"single_turn_{budget}"], final[f"random_feedback_{budget}"]
    claims = [
        (_times(rate, start_rate), "the start model", f"{budget} from {start_rate:.1%} to {rate:.1%}"),
        (
            _times(rate, single),
            "its own single responses",
            f"{budget} {rate:.1%} in dialogs, {single:.1%} without",
        ),
    ]
    if rate > 0:
        lost = f"{budget} falls from {rate:.1%} to {random:.1%}"
        claims.append((f"{(random - rate) / rate:+.0%}", "when the feedback is another program's", lost))
    return claims


def _times(value: float, base: float) -> str:
    return f"{value / base:.2f} ×" if base > 0 else "0 →"


def _outcome_tables(
    summary: Mapping[str, Any],
) -> dict[str, list[tuple[str, list[tuple[int, float]]]]]:
    """Per phase, a row for each outcome that occurs: per turn, (count, share of the turn's responses)."""
    tables: dict[str, list[tuple[str, list[tuple[int, float]]]]] = {}
    for phase in PHASES:
        conditions = (summary.get(phase) or {}).get("conditions", {})
        turns = conditions.get("true_feedback", {}).get("outcomes", [])
        totals = [sum(turn.values()) for turn in turns]
        rows = [
            (
                outcome.value,
                [(turn[outcome], turn[outcome] / total) for turn, total in zip(turns, totals, strict=True)],
            )
            for outcome in reversed(TurnOutcome)
            if any(turn[outcome] for turn in turns)
        ]
        if rows:
            tables[phase] = rows
    return tables


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pair:
    """The same problem, under the same condition and random numbers, before and after."""

    problem_id: str
    condition: str
    statement: str
    dialogs: tuple[DialogExample, ...]  # in the order of PHASES; one of them may be missing

    @property
    def tags(self) -> list[str]:
        """What the filter knows it by."""
        solved = {dialog.phase: dialog.solved for dialog in self.dialogs}
        verdict = {
            (False, True): "newly-solved",
            (True, False): "lost",
            (True, True): "solved-twice",
        }.get((solved.get("start", False), solved.get("final", False)), "unsolved")
        newest = self.dialogs[-1]
        repaired = ["repaired"] if newest.solved and _responses(newest) > 1 else []
        return [verdict, *repaired]


def _responses(dialog: DialogExample) -> int:
    return sum(message.role == "assistant" for message in dialog.messages)


def _pair(dialogs: Sequence[DialogExample]) -> list[_Pair]:
    groups: dict[tuple[str, str], list[DialogExample]] = {}
    for dialog in dialogs:
        groups.setdefault((dialog.condition, dialog.problem_id), []).append(dialog)
    return [
        _Pair(
            problem_id=problem_id,
            condition=condition,
            statement=group[0].statement,
            dialogs=tuple(sorted(group, key=lambda dialog: PHASES.index(dialog.phase))),
        )
        for (condition, problem_id), group in groups.items()
    ]


def _charts(metrics: Sequence[StepStats]) -> list[tuple[str, markupsafe.Markup]]:
    """(title, inline SVG) of every curve that has a point, and of the seconds by phase."""
    charts: list[tuple[str, markupsafe.Markup]] = []
    for chart in _CHARTS:
        points = [(stats.step, stats.metrics.get(chart.metric, math.nan)) for stats in metrics]
        if any(math.isfinite(value) for _, value in points):
            figure, axes = new_figure("step", chart.unit)
            _draw_curve(axes, points)
            charts.append((chart.title, inline_svg(figure, chart.title)))
    between = {f"{SECONDS}/{phase}" for phase in BETWEEN_STEPS}
    recorded = {name for stats in metrics for name in stats.metrics if name.startswith(f"{SECONDS}/")}
    phases = sorted(recorded - between)
    if phases:
        figure, axes = new_figure("step", "seconds a step")
        _draw_phases(axes, metrics, phases)
        charts.append(("Seconds by phase", inline_svg(figure, "Seconds by phase")))
    return charts


def _draw_curve(axes: Axes, points: Sequence[tuple[int, float]]) -> None:
    """Every step faintly, and a running mean over about a twelfth of the run."""
    steps, values = zip(*points, strict=True)
    axes.plot(steps, values, color=SERIES[0], linewidth=1, alpha=0.35, marker=".", markersize=3)
    axes.plot(steps, _running_mean(values, window=max(1, len(values) // 12)), color=SERIES[0], linewidth=2)


def _running_mean(values: Sequence[float], *, window: int) -> list[float]:
    """Mean of the finite values among each step and the `window - 1` before it; NaN where there is none."""
    means: list[float] = []
    for end in range(1, len(values) + 1):
        finite = [value for value in values[max(0, end - window) : end] if math.isfinite(value)]
        means.append(sum(finite) / len(finite) if finite else math.nan)
    return means


def _draw_phases(axes: Axes, metrics: Sequence[StepStats], phases: Sequence[str]) -> None:
    steps = [stats.step for stats in metrics]
    floor = [0.0] * len(steps)
    for place, phase in enumerate(phases):
        seconds = [stats.metrics.get(phase, 0.0) for stats in metrics]
        top = [below + spent for below, spent in zip(floor, seconds, strict=True)]
        colour = SERIES[place % len(SERIES)]
        label = phase.removeprefix(f"{SECONDS}/").replace("_", " ")
        axes.bar(
            steps, seconds, bottom=floor, width=1.0, color=colour, linewidth=0, antialiased=False, label=label
        )
        floor = top
    axes.legend(
        frameon=False, fontsize=9, labelcolor=INK, ncols=2, loc="upper left", bbox_to_anchor=(0, 1.22)
    )
