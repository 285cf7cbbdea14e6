"""`rlef train|eval|export|...`: reads the command line, checks everything, then hands over.

What the user must mend is one line on standard error and exit status 2, before any process starts.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from rlef.arithmetic import describe_arithmetic, of_learners
from rlef.commands import (
    check_inputs,
    check_problems_and_executor,
    errors_in_one_line,
    refuse,
    require_empty,
    require_writable,
)
from rlef.config import Config, ConfigError
from rlef.files import write_text
from rlef.launch import TOLD, die_with_parent, launched_by_torchrun, require_restartable, run_processes
from rlef.problem_commands import problems_group
from rlef.settings_file import load_config
from rlef_sandbox import SandboxFault

_CONFIG = click.argument("config_file", metavar="CONFIG", type=click.Path(path_type=Path))
_OVERRIDES = click.argument("overrides", metavar="[SECTION.KEY=VALUE]...", nargs=-1)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="rlef")
def main() -> None:
    """Reinforcement learning of code models with execution feedback."""


main.add_command(problems_group)


@main.command()
@_CONFIG
@_OVERRIDES
@click.option(
    "--resume", default="auto", metavar="auto|never|PATH", show_default=True, help="Where to start from."
)
@click.option(
    "--dry-run", is_flag=True, help="Check everything, print the settings and the batch arithmetic, stop."
)
@errors_in_one_line
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
@errors_in_one_line
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
        require_writable(output)
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
        check_problems_and_executor(config)
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
@errors_in_one_line
def compare(first: Path, second: Path, output: Path | None) -> None:
    """Compare two evaluations of the same problems, B minus A: folders of `rlef eval --episodes`."""
    from rich.console import Console

    from rlef.comparison import compare_evaluations, comparison_table

    if output is not None:
        require_writable(output)
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
@errors_in_one_line
def export(run_folder: Path, output: Path, checkpoint: Path | None, dtype: str, max_file_mb: float) -> None:
    """Write a run's policy as a Hugging Face folder."""
    from rlef.run_folder import RunFolder, read_run_config
    from rlef.standalone import export_policy

    config = of_learners(read_run_config(run_folder))
    require_empty(output)
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
@errors_in_one_line
def pretrain(output: Path, steps: int | None, seed: int | None) -> None:
    """Make the starting model again: a tokenizer and a small Llama, from a seed."""
    from dataclasses import replace

    from rlef.pretrain import Recipe
    from rlef.pretrain import pretrain as make

    require_empty(output)
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
@errors_in_one_line
def import_gguf(file: Path, output: Path, dtype: str) -> None:
    """Make the model in a GGUF FILE into a model folder."""
    import torch

    from rlef.gguf_import import import_gguf as make

    require_empty(output)
    made = make(file, output, dtype=getattr(torch, dtype))
    click.echo(
        f"wrote {output}: {made.shape.model_type} of {made.parameters:,} parameters, "
        f"license {made.license or 'not named'}"
    )


@main.command()
@click.argument("run_folder", type=click.Path(path_type=Path))
@errors_in_one_line
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
@errors_in_one_line
def doctor(config_file: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """Look whether this machine can run CONFIG, and say how to mend what is amiss.

    Status 0 if a run can start, 1 if something must be mended first. Run it on each kind of machine.
    """
    from rlef.doctor import diagnose
    from rlef.findings import Level

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
@errors_in_one_line
def plan(config_file: Path, overrides: tuple[str, ...], model: str | None, **options: Any) -> None:
    """Predict memory and step time of CONFIG on a cluster, rank the layouts, print the command."""
    from rlef.plan_report import show_plan

    given = (*overrides, f"model.path={model}") if model else overrides
    show_plan(load_config(config_file, given), [str(config_file), *given], **options)


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
        return refuse(error)
    except RunFault as fault:
        if not (fault.is_told or (fault.is_shared and os.environ.get("RANK", "0") != "0")):
            click.echo(f"rlef: error: {described(fault)}", err=True)
        return TOLD if fault.is_own else 1


def _of_command(status: int) -> int:
    """What a shell or torchrun gets to see for what a process ended with."""
    return 1 if status == TOLD else status


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
