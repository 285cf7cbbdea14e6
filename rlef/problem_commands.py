"""`rlef problems convert|check|select|contamination|examples`: what the command line does with files of
problems."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from rlef.commands import errors_in_one_line, require_file, require_other_file, require_writable
from rlef.config import Config, ConfigError
from rlef.files import write_text
from rlef.settings_file import load_config
from rlef_sandbox import Executor, SandboxFault

if TYPE_CHECKING:
    from rlef.records import Problem  # which imports torch


@click.group("problems")
def problems_group() -> None:
    """Convert published problem sets; check, select and compare problem files."""


_PROBLEM_FILE = "a JSONL file of problems"
_MAX_TEST_BYTES = click.option(
    "--max-test-bytes", type=click.IntRange(min=1), help="Instead of the default of problems.max_test_bytes."
)
_SOLUTIONS = click.option(
    "--solutions", type=click.IntRange(min=0), default=5, show_default=True, help="Programs of each kind."
)
_ALLOW_MISSING = click.option(
    "--allow-missing", multiple=True, metavar="LAYER", help="As executor.allow_missing; may be repeated."
)
_WORKERS = click.option("--workers", type=click.IntRange(min=1), help="Programs that run at once.")


@problems_group.command("convert")
@click.argument("format_name", metavar="FORMAT")
@click.argument("inputs", metavar="INPUT...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.argument("output", metavar="OUTPUT", type=click.Path(path_type=Path))
@click.option(
    "--against",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Report statements that this JSONL file has, too, such as that of another split; may be repeated.",
)
@click.option("--drop-duplicates", is_flag=True, help="Leave repeated statements out.")
@click.option(
    "--public-tests",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="How many of the first tests are public, where the source does not say which.",
)
@click.option("--generated-tests", is_flag=True, help="CodeContests: generated tests are private ones, too.")
@click.option("--report", type=click.Path(path_type=Path), help="Write what was left out to this JSON file.")
@_SOLUTIONS
@_MAX_TEST_BYTES
@_ALLOW_MISSING
@_WORKERS
@errors_in_one_line
def convert_problems(
    format_name: str,
    inputs: tuple[Path, ...],
    output: Path,
    against: tuple[Path, ...],
    drop_duplicates: bool,
    public_tests: int,
    generated_tests: bool,
    report: Path | None,
    solutions: int,
    max_test_bytes: int | None,
    allow_missing: tuple[str, ...],
    workers: int | None,
) -> None:
    """Write the problems of published files to OUTPUT, a JSONL file: docs/problems.md names the formats."""
    from rlef.sources.common import Choices
    from rlef.sources.convert import FORMATS, USES_SANDBOX, convert

    if format_name not in FORMATS:
        raise ConfigError(f"there is no format {format_name!r}; use one of {', '.join(FORMATS)}")
    for file in against:
        require_file(file, _PROBLEM_FILE)
    _require_places((output, report), but=(*inputs, *against))
    defaults = Config()
    choices = Choices(
        defaults=defaults.executor,
        max_test_bytes=max_test_bytes or defaults.problems.max_test_bytes,
        public_tests=public_tests,
        generated_tests=generated_tests,
        solutions=solutions,
    )
    with contextlib.ExitStack() as stack:
        made = convert(
            format_name,
            inputs,
            output,
            choices=choices,
            against=against,
            drop_duplicates=drop_duplicates,
            executor=(
                stack.enter_context(_executor(workers, allow_missing))
                if format_name in USES_SANDBOX
                else None
            ),
        )
    if report is not None:
        write_text(report, json.dumps(made.as_json(), indent=1) + "\n")
    for line in made.lines():
        click.echo(line)
    click.echo(f"wrote {output}")


@problems_group.command("check")
@click.argument("file", metavar="FILE", type=click.Path(path_type=Path))
@click.option("--runs", type=click.IntRange(min=1), default=2, show_default=True, help="Of each program.")
@click.option("--output", type=click.Path(path_type=Path), help="Also write the findings to this JSON file.")
@_SOLUTIONS
@_MAX_TEST_BYTES
@_ALLOW_MISSING
@_WORKERS
@errors_in_one_line
def check_problem_file(
    file: Path,
    runs: int,
    output: Path | None,
    solutions: int,
    max_test_bytes: int | None,
    allow_missing: tuple[str, ...],
    workers: int | None,
) -> None:
    """Run the solutions and the known-wrong programs of FILE, a JSONL file, and say what is amiss.

    Status 0 if nothing is, 1 if something is.
    """
    from rich.console import Console

    from rlef.problem_check import check_problems, summary, table

    require_file(file, _PROBLEM_FILE)
    _require_places((output,), but=(file,))
    problems = _problems_of(file, max_test_bytes)
    with _executor(workers, allow_missing) as executor:
        checks = list(check_problems(problems, executor, runs=runs, solutions=solutions))
    found = summary(checks)
    if output is not None:
        write_text(output, json.dumps(found, indent=1) + "\n")
    if found["amiss"]:
        Console(width=None if sys.stdout.isatty() else 160).print(table(checks))
    click.echo(
        f"{found['sound']} of {found['problems']} problems are sound; {found['solutions']} solutions and "
        f"{found['incorrect_solutions']} known-wrong programs were run {runs} times"
    )
    sys.exit(bool(found["amiss"]))


@problems_group.command("examples")
@click.argument("config_file", metavar="CONFIG", type=click.Path(path_type=Path))
@click.argument("folder", metavar="EVALUATION", type=click.Path(path_type=Path))
@click.argument("output", metavar="OUTPUT", type=click.Path(path_type=Path))
@click.argument("overrides", metavar="[SECTION.KEY=VALUE]...", nargs=-1)
@click.option("--count", type=click.IntRange(min=1), default=2, show_default=True, help="Of dialogs.")
@errors_in_one_line
def write_example_dialogs(
    config_file: Path, folder: Path, output: Path, overrides: tuple[str, ...], count: int
) -> None:
    """Write dialogs of EVALUATION that feedback led to a solution to OUTPUT, a file for rollout.few_shot.

    EVALUATION is the folder of `rlef eval --episodes`; CONFIG must name its problems as problems.eval.
    """
    from rlef.few_shot import write_examples
    from rlef.few_shot_examples import examples_from

    require_writable(output)
    examples = examples_from(load_config(config_file, overrides), folder, count=count)
    write_examples(output, examples)
    click.echo(f"wrote {output}: {len(examples)} dialogs")


@problems_group.command("select")
@click.argument("file", metavar="FILE", type=click.Path(path_type=Path))
@click.argument("output", metavar="OUTPUT", type=click.Path(path_type=Path))
@click.option(
    "--rates",
    "folders",
    multiple=True,
    required=True,
    metavar="FOLDER",
    type=click.Path(path_type=Path),
    help="Of rlef eval --episodes, on these problems; may be repeated: dialogs are counted together.",
)
@click.option(
    "--min-solve-rate", type=click.FloatRange(0, 1), default=0.0, show_default=True, help="Least one kept."
)
@click.option(
    "--max-solve-rate", type=click.FloatRange(0, 1), default=1.0, show_default=True, help="Largest one kept."
)
@click.option("--drop-unknown", is_flag=True, help="Leave problems out of which there is no dialog.")
@click.option(
    "--temperature", type=click.FloatRange(min=0), help="Of the dialogs that count, if there are several."
)
@click.option("--turns", type=click.IntRange(min=1), help="Count dialogs as if they had at most so many.")
@click.option("--report", type=click.Path(path_type=Path), help="Write each problem's counts to this JSON.")
@_MAX_TEST_BYTES
@errors_in_one_line
def select_problems(
    file: Path,
    output: Path,
    folders: tuple[Path, ...],
    min_solve_rate: float,
    max_solve_rate: float,
    drop_unknown: bool,
    temperature: float | None,
    turns: int | None,
    report: Path | None,
    max_test_bytes: int | None,
) -> None:
    """Write those problems of FILE to OUTPUT that a model solves neither too seldom nor too often, each with
    its solve rate under true feedback."""
    from rlef.problems import write_jsonl
    from rlef.selection import Selection, rates_in

    if min_solve_rate > max_solve_rate:
        raise ConfigError(
            f"--min-solve-rate {min_solve_rate:g} is above --max-solve-rate {max_solve_rate:g}, which keeps "
            "nothing; lower it"
        )
    require_file(file, _PROBLEM_FILE)
    rates = rates_in(folders, temperature=temperature, turns=turns)
    _require_places((output, report), but=(file,))
    selection = Selection(
        rates=rates,
        min_solve_rate=min_solve_rate,
        max_solve_rate=max_solve_rate,
        drops_unknown=drop_unknown,
    )
    write_jsonl(output, selection.of(_problems_of(file, max_test_bytes)))
    if report is not None:
        counted = {name: asdict(rate) for name, rate in rates.items()}
        write_text(report, json.dumps({"counts": selection.counts, "problems": counted}, indent=1) + "\n")
    for verdict, count in sorted(selection.counts.items()):
        click.echo(f"{count:>7}  {verdict}")
    click.echo(f"wrote {output}")


@problems_group.command("contamination")
@click.argument("train", metavar="TRAIN", type=click.Path(path_type=Path))
@click.argument("evaluation", metavar="EVAL", type=click.Path(path_type=Path))
@click.option("--words", type=click.IntRange(min=8), default=13, show_default=True, help="Of an n-gram.")
@click.option(
    "--min-overlap",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.5,
    show_default=True,
    help="Share of a problem's n-grams in one training problem, from which on it is found.",
)
@click.option("--output", type=click.Path(path_type=Path), help="Also write the findings to this JSON file.")
@_MAX_TEST_BYTES
@errors_in_one_line
def find_contaminated_problems(
    train: Path,
    evaluation: Path,
    words: int,
    min_overlap: float,
    output: Path | None,
    max_test_bytes: int | None,
) -> None:
    """Find the problems of EVAL that are in TRAIN, too, whole or in part: both are JSONL files.

    Status 0 if there are none, 1 if there are.
    """
    from rlef.contamination import find_contamination

    for file in (train, evaluation):
        require_file(file, _PROBLEM_FILE)
    _require_places((output,), but=(train, evaluation))
    findings = list(
        find_contamination(
            _problems_of(train, max_test_bytes),
            _problems_of(evaluation, max_test_bytes),
            words=words,
            min_overlap=min_overlap,
        )
    )
    if output is not None:
        write_text(output, json.dumps([asdict(finding) for finding in findings], indent=1) + "\n")
    for finding in findings:
        click.echo(f"{finding.eval_id} ~ {finding.train_id}: {finding.evidence}: {finding.detail}")
    of_eval = len({finding.eval_id for finding in findings})
    click.echo(f"{of_eval} problems of {evaluation} are in {train}, whole or in part")
    sys.exit(bool(findings))


def _require_places(outputs: Sequence[Path | None], *, but: Sequence[Path]) -> None:
    """The files can be written, and are none that is read nor each other."""
    named = list(but)
    for output in outputs:
        if output is not None:
            require_other_file(output, named)
            require_writable(output)
            named.append(output)


def _problems_of(file: Path, max_test_bytes: int | None) -> Iterator[Problem]:
    """Raises ConfigError at its end, if there is none."""
    from rlef.problems import read_jsonl

    defaults = Config()
    limit = max_test_bytes or defaults.problems.max_test_bytes
    is_empty = True
    for problem in read_jsonl(file, defaults=defaults.executor, max_test_bytes=limit):
        yield problem
        is_empty = False
    if is_empty:
        raise ConfigError(f"{file} holds no problem; put one JSON object on each line")


def _executor(workers: int | None, allow_missing: tuple[str, ...]) -> Executor:
    try:
        return Executor(workers=workers, allow_missing=allow_missing)
    except (ValueError, SandboxFault) as error:
        raise ConfigError(f"the sandbox does not start: {error}") from None
