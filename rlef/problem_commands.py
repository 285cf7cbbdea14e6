"""`rlef problems convert|check|examples`: what the command line does with files of problems."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path

import click

from rlef.commands import errors_in_one_line, require_writable
from rlef.config import Config, ConfigError, load_config
from rlef.files import write_text
from rlef_sandbox import Executor, SandboxFault


@click.group("problems")
def problems_group() -> None:
    """Convert published problem sets, and check problem files."""


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
    from rlef.sources.convert import FORMATS, RUNS_REFERENCES, convert

    if format_name not in FORMATS:
        raise ConfigError(f"there is no format {format_name!r}; use one of {', '.join(FORMATS)}")
    for file in (output, report):
        if file is not None:
            require_writable(file)
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
                if format_name in RUNS_REFERENCES
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
    from rlef.problems import read_jsonl

    if not file.is_file():
        amiss = f"{str(file)!r} is a folder" if file.is_dir() else f"there is no file {str(file)!r}"
        raise ConfigError(f"{amiss}; give a JSONL file of problems")
    if output is not None:
        require_writable(output)
    defaults = Config()
    problems = read_jsonl(
        file,
        defaults=defaults.executor,
        max_test_bytes=max_test_bytes or defaults.problems.max_test_bytes,
    )
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


def _executor(workers: int | None, allow_missing: tuple[str, ...]) -> Executor:
    try:
        return Executor(workers=workers, allow_missing=allow_missing)
    except (ValueError, SandboxFault) as error:
        raise ConfigError(f"the sandbox does not start: {error}") from None
