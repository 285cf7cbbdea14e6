"""`rlef train|eval|export|...`: reads the command line, checks everything, then hands over.

What the user must mend is one line on standard error and exit status 2, before any process starts.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import click

from rlef.config import (
    Config,
    ConfigError,
    check_context,
    describe_arithmetic,
    load_config,
    of_learners,
)
from rlef.files import write_text
from rlef.launch import TOLD, die_with_parent, launched_by_torchrun, require_restartable, run_processes
from rlef_sandbox import Executor, SandboxFault

_F = TypeVar("_F", bound=Callable[..., Any])

_CONFIG = click.argument("config_file", metavar="CONFIG", type=click.Path(path_type=Path))
_OVERRIDES = click.argument("overrides", metavar="[SECTION.KEY=VALUE]...", nargs=-1)


def _errors_in_one_line(command: _F) -> _F:
    @functools.wraps(command)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except ConfigError as error:
            sys.exit(_refuse(error))

    return guarded  # type: ignore[return-value]


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="rlef")
def main() -> None:
    """Reinforcement learning of code models with execution feedback."""


@main.command()
@_CONFIG
@_OVERRIDES
@click.option(
    "--resume", default="auto", metavar="auto|never|PATH", show_default=True, help="Where to start from."
)
@click.option(
    "--dry-run", is_flag=True, help="Check everything, print the settings and the batch arithmetic, stop."
)
@_errors_in_one_line
def train(config_file: Path, overrides: tuple[str, ...], resume: str, dry_run: bool) -> None:
    """Train as CONFIG (a TOML file) says, and report."""
    from rlef.run_folder import only_one_run, open_run_folder

    config = load_config(config_file, (*overrides, *_given_by_torchrun()))
    require_restartable()
    check_inputs(config)
    if dry_run:
        click.echo(json.dumps(config.model_dump(mode="json"), indent=2))
        for what, number in describe_arithmetic(config).items():
            click.echo(f"{what}: {number:,}")
        return
    if launched_by_torchrun():
        sys.exit(_train_under_torchrun(config, resume))
    with only_one_run(config):
        folder, note = open_run_folder(config, resume=resume)
        if note:
            click.echo(note)
        status = run_processes(
            _train,
            (config, folder),
            processes=config.parallel.processes,
            threads=config.parallel.threads_per_process,
        )
    if status == 0:
        _show_result(folder.path)
    elif status not in (2, TOLD):  # which have said what to mend
        click.echo(
            f"rlef: error: a process of the run ended with status {status}; "
            "the same command continues from the last checkpoint",
            err=True,
        )
    sys.exit(_of_command(status))


@main.command("eval")
@_CONFIG
@_OVERRIDES
@click.option("--output", type=click.Path(path_type=Path), help="Also write the figures to this JSON file.")
@click.option(
    "--episodes",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Measure all budgets, turn limits and kinds of feedback, and keep dialogs and figures in FOLDER; "
    "the same command goes on where it stopped.",
)
@click.option(
    "--server", metavar="URL", help="Of an OpenAI-compatible API, whose model is evaluated instead."
)
@click.option("--model", metavar="NAME", help="The model's name on the server.")
@click.option("--api-key-env", metavar="VARIABLE", help="Where in the environment the server's key is.")
@_errors_in_one_line
def evaluate(
    config_file: Path,
    overrides: tuple[str, ...],
    output: Path | None,
    episodes: Path | None,
    server: str | None,
    model: str | None,
    api_key_env: str | None,
) -> None:
    """Evaluate model.path on problems.eval: true, random and no feedback, and single responses."""
    given = {"server.url": server, "server.model": model, "server.api_key_env": api_key_env}
    config = load_config(
        config_file, (*overrides, *(f"{name}={value}" for name, value in given.items() if value is not None))
    )
    if output is not None:
        _require_writable(output)
    if episodes is not None:
        figures = _evaluate_matrix(config, episodes)
    elif config.server.url:
        raise ConfigError("a server's model is evaluated into a folder: name one by --episodes FOLDER")
    else:
        check_inputs(config)
        from rlef.standalone import evaluate_model

        figures = evaluate_model(config)
        for name, (low, high) in figures["intervals"].items():
            click.echo(f"{name:>22}  {figures[name]:.3f}  [{low:.3f}, {high:.3f}]")
    if output is not None:
        write_text(output, json.dumps(figures, indent=1) + "\n")


def _evaluate_matrix(config: Config, folder: Path) -> dict[str, Any]:
    from rich.console import Console

    from rlef.chat_server import ServerFault, check_server
    from rlef.evaluation_page import PAGE_FILE, matrix_table, write_page
    from rlef.measurement import at_its_extremes, check_matrix
    from rlef.standalone import evaluate_matrix

    config = at_its_extremes(config)
    check_matrix()
    if config.server.url:
        check_server(config.server)
        _check_problems_and_executor(config)
    else:
        check_inputs(config)
    try:
        figures = evaluate_matrix(config, folder, note=click.echo)
    except (ServerFault, SandboxFault) as fault:
        click.echo(f"rlef: error: {fault}; the same command goes on from here", err=True)
        sys.exit(1)
    write_page(folder)
    Console().print(matrix_table(figures))
    click.echo(f"page: {folder / PAGE_FILE}")
    return figures


@main.command()
@click.argument("first", metavar="A", type=click.Path(path_type=Path))
@click.argument("second", metavar="B", type=click.Path(path_type=Path))
@click.option(
    "--output", type=click.Path(path_type=Path), help="Also write the differences to this JSON file."
)
@_errors_in_one_line
def compare(first: Path, second: Path, output: Path | None) -> None:
    """Compare two evaluations of the same problems, B minus A: folders of `rlef eval --episodes`."""
    from rich.console import Console

    from rlef.comparison import compare_evaluations, comparison_table

    if output is not None:
        _require_writable(output)
    differences = compare_evaluations(first, second)
    if output is not None:
        write_text(output, json.dumps([asdict(row) for row in differences], indent=1) + "\n")
    Console().print(comparison_table(differences))


@main.command()
@click.argument("run_folder", type=click.Path(path_type=Path))
@click.argument("output", type=click.Path(path_type=Path))
@click.option(
    "--checkpoint", type=click.Path(path_type=Path), help="A checkpoint of the run; the newest if left out."
)
@click.option(
    "--dtype",
    type=click.Choice(["source", "float32", "bfloat16", "float16"]),
    default="source",
    show_default=True,
    help="Type of the weights; source: that of the model that the run started from.",
)
@click.option(
    "--max-file-mb",
    type=click.FloatRange(min=0, min_open=True),
    default=2000,
    show_default=True,
    help="A larger model is written as several files of at most this.",
)
@_errors_in_one_line
def export(run_folder: Path, output: Path, checkpoint: Path | None, dtype: str, max_file_mb: float) -> None:
    """Write a run's policy as a Hugging Face folder."""
    from rlef.run_folder import RunFolder, read_run_config
    from rlef.standalone import export_policy

    config = of_learners(read_run_config(run_folder))
    _require_empty(output)
    folder = RunFolder(path=run_folder, checkpoint=checkpoint)
    max_file_bytes = int(max_file_mb * 1000**2)
    status = _with_status(
        lambda: export_policy(config, folder, output, dtype=dtype, max_file_bytes=max_file_bytes)
    )
    if status == 0:
        click.echo(f"wrote {output}")
    sys.exit(status)


@main.command()
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--steps", type=click.IntRange(min=1), help="Optimiser steps; the recipe's if left out.")
@click.option("--seed", type=click.IntRange(min=0), help="The recipe's if left out.")
@_errors_in_one_line
def pretrain(output: Path, steps: int | None, seed: int | None) -> None:
    """Make the starting model again: a tokenizer and a small Llama, from a seed."""
    from dataclasses import replace

    from rlef.pretrain import Recipe
    from rlef.pretrain import pretrain as make

    _require_empty(output)
    recipe = Recipe()
    recipe = replace(recipe, steps=steps or recipe.steps, seed=recipe.seed if seed is None else seed)
    make(output, recipe, log=click.echo)
    click.echo(f"wrote {output}")


@main.command("import-gguf")
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("output", type=click.Path(path_type=Path))
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16"]),
    default="float32",
    show_default=True,
    help="Type of the weights; they are computed in float32.",
)
@_errors_in_one_line
def import_gguf(file: Path, output: Path, dtype: str) -> None:
    """Make the model in a GGUF FILE into a model folder."""
    import torch

    from rlef.gguf_import import import_gguf as make

    _require_empty(output)
    made = make(file, output, dtype=getattr(torch, dtype))
    click.echo(
        f"wrote {output}: {made.shape.model_type} of {made.parameters:,} parameters, "
        f"license {made.license or 'not named'}"
    )


@main.command()
@click.argument("run_folder", type=click.Path(path_type=Path))
@_errors_in_one_line
def report(run_folder: Path) -> None:
    """Write a run's report.html again, and show its table."""
    from rlef.report import write_report

    try:
        write_report(run_folder)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    _show_result(run_folder)


@main.command()
@_CONFIG
@_OVERRIDES
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line instead of text.")
@_errors_in_one_line
def doctor(config_file: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """Look whether this machine can run CONFIG, and say how to mend what is amiss.

    Status 0 if a run can start, 1 if something must be mended first. Run it on each kind of machine.
    """
    from rlef.doctor import Level, diagnose

    config = load_config(config_file, overrides)
    worst = Level.GOOD
    for finding in diagnose(config):
        worst = max(worst, finding.level, key=list(Level).index)
        if as_json:
            click.echo(json.dumps(asdict(finding)))
            continue
        click.echo(f"{finding.level:<8} {finding.subject}: {finding.found}")
        if finding.mend:
            click.echo(f"{'':<8} -> {finding.mend}")
    sys.exit(worst is Level.FAULT)


@main.command()
@_CONFIG
@_OVERRIDES
@click.option("--gpu", required=True, metavar="NAME", help="Type of the GPUs, such as H100.")
@click.option("--nodes", type=click.IntRange(min=1), required=True, help="Of the cluster.")
@click.option("--gpus-per-node", type=click.IntRange(min=1), default=8, show_default=True, help="GPUs.")
@click.option(
    "--network-gbps",
    type=click.FloatRange(min=0, min_open=True),
    default=400.0,
    show_default=True,
    help="Between nodes, per GPU.",
)
@click.option("--model", metavar="FOLDER|NAME", help="Instead of model.path; a NAME such as llama-3.1-8b.")
@click.option("--assume", multiple=True, metavar="NAME=NUMBER", help="Change an assumption: docs/plan.md.")
@click.option("--top", type=click.IntRange(min=1), default=8, show_default=True, help="Layouts to show.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of tables.")
@_errors_in_one_line
def plan(config_file: Path, overrides: tuple[str, ...], model: str | None, **options: Any) -> None:
    """Predict memory and step time of CONFIG on a cluster, rank the layouts, print the command."""
    from rlef.plan_report import show_plan

    given = (*overrides, f"model.path={model}") if model else overrides
    show_plan(load_config(config_file, given), [str(config_file), *given], **options)


@main.group("problems")
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
@_errors_in_one_line
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
            _require_writable(file)
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
@_errors_in_one_line
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
        found = f"{str(file)!r} is a folder" if file.is_dir() else f"there is no file {str(file)!r}"
        raise ConfigError(f"{found}; give a JSONL file of problems")
    if output is not None:
        _require_writable(output)
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


def _executor(workers: int | None, allow_missing: tuple[str, ...]) -> Executor:
    try:
        return Executor(workers=workers, allow_missing=allow_missing)
    except (ValueError, SandboxFault) as error:
        raise ConfigError(f"the sandbox does not start: {error}") from None


def _require_writable(file: Path) -> None:
    """Before minutes of work: the file's folder can be made, and written to."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=file.parent):
            pass
    except OSError as error:
        raise ConfigError(
            f"--output {file} cannot be written ({error.strerror}); name another place"
        ) from None


def _require_empty(output: Path) -> None:
    """Before hours of work: the folder can be written, and nothing in it is lost."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        occupied = any(output.iterdir())
    except OSError as error:
        raise ConfigError(f"{output} cannot be written ({error.strerror}); name another folder") from None
    if occupied:
        raise ConfigError(f"{output} is not empty; name another folder")


def check_inputs(config: Config) -> None:
    """Read the model's shape, the dialog markers and the problem files, and start the sandbox once.

    A `ConfigError` says what to mend.
    """
    from rlef.families import read_shape
    from rlef.pretrained import StoredWeights, model_folder
    from rlef.prompts import Dialog
    from rlef.samplers import check_sampler
    from rlef.shards import check_layout, check_weights

    folder = model_folder(config.model.path)
    shape = read_shape(folder)
    check_weights(StoredWeights(folder), shape)
    check_layout(shape, config.parallel, config.parallel.learners)
    check_context(config, shape.max_position_embeddings)
    check_sampler(config, shape)
    Dialog.read(folder, config.rollout).check_vocabulary(shape.vocab_size)
    _check_problems_and_executor(config)


def _check_problems_and_executor(config: Config) -> None:
    from rlef import problems
    from rlef.execution import open_executor, share_of_cores

    problems.check(config)
    processes_here = int(os.environ.get("LOCAL_WORLD_SIZE", config.parallel.processes))
    share_of_cores(config.executor, os.sched_getaffinity(0), processes=processes_here, index=0)
    try:
        open_executor(config.executor, workers=1).close()
    except (ValueError, SandboxFault) as error:
        raise ConfigError(f"executor: {error}") from None


def _given_by_torchrun() -> tuple[str, ...]:
    """torchrun has decided on the number of processes, so the settings follow."""
    return (f"parallel.processes={os.environ['WORLD_SIZE']}",) if launched_by_torchrun() else ()


def _train(config: Config, folder: Any) -> int:
    from rlef.train import train as run

    return _with_status(lambda: run(config, folder))


def _with_status(action: Callable[[], int]) -> int:
    from rlef.checkpoint_files import CheckpointError
    from rlef.faults import RunFault, described

    try:
        return action()
    except (ConfigError, CheckpointError) as error:
        return _refuse(error)
    except RunFault as fault:
        if not (fault.is_told or (fault.is_shared and os.environ.get("RANK", "0") != "0")):
            click.echo(f"rlef: error: {described(fault)}", err=True)
        return TOLD if fault.is_own else 1


def _of_command(status: int) -> int:
    """What a shell or torchrun gets to see for what a process ended with."""
    return 1 if status == TOLD else status


def _refuse(error: ValueError) -> int:
    """Tell the user what to mend, once for all processes; the exit status."""
    if os.environ.get("RANK", "0") == "0":
        click.echo(f"rlef: error: {error}", err=True)
    return 2


def _train_under_torchrun(config: Config, resume: str) -> int:
    """Rank 0 opens the run's folder for all."""
    from rlef.train import train_under_torchrun

    die_with_parent(os.getppid())
    rank_is_first = os.environ["RANK"] == "0"
    status = _with_status(lambda: train_under_torchrun(config, resume))
    if status == 0 and rank_is_first:
        _show_result(Path(config.run.output_dir) / config.run.name)
    if status == TOLD:
        # A thread may still ask a store that does not answer, and the interpreter would abort over it.
        sys.stderr.flush()
        os._exit(_of_command(status))
    return _of_command(status)


def _show_result(path: Path) -> None:
    from rich.console import Console

    from rlef.report import REPORT_FILE, SUMMARY_FILE, before_after_table

    if not (path / SUMMARY_FILE).exists():  # stopped before it had evaluated anything
        return
    summary = json.loads((path / SUMMARY_FILE).read_text(encoding="utf-8"))
    if summary["final"] is None:
        return
    Console().print(before_after_table(summary))
    click.echo(f"report: {path / REPORT_FILE}")
