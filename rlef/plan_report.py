"""What `rlef plan` prints: tables for people, one JSON object for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from rlef.arithmetic import check_context, longest_dialog
from rlef.config import Config
from rlef.plan import Candidate, Plan, launch_command, loading_refusal, make_plan, trainer_with
from rlef.plan_cluster import cluster_of, with_assumptions
from rlef.plan_memory import Layout
from rlef.plan_model import NAMED, read_model
from rlef.plan_time import workload_of

_WIDTH = 160  # of tables that no terminal bounds


def show_plan(
    config: Config,
    arguments: Sequence[str],
    *,
    gpu: str,
    nodes: int,
    gpus_per_node: int,
    network_gbps: float,
    assume: Sequence[str],
    top: int,
    as_json: bool,
) -> None:
    """Print the plan of `config`, which the words `arguments` of the command line made: run file, overrides.

    Raises:
        ConfigError: the GPU or an assumption is unknown, the model is, or nothing divides the cluster.
    """
    assumptions = with_assumptions(assume)
    cluster = cluster_of(gpu, nodes=nodes, gpus_per_node=gpus_per_node, network_gbps=network_gbps)
    model = _model_of(config.model.path)
    size = read_model(model)
    check_context(config, size.max_position_embeddings)
    work = workload_of(config, assumptions, longest_tokens=longest_dialog(config))
    plan = make_plan(
        size,
        cluster,
        work,
        assumptions,
        trainer=trainer_with(config.rollout),
        refusal=loading_refusal(model),
    )
    runnable = plan.runnable
    command = None
    if runnable:
        is_stale = config.rollout.max_staleness > 0
        command = launch_command(runnable, cluster, arguments, is_stale=is_stale)
    shown = chosen(plan, top)
    if as_json:
        print(json.dumps(plan_as_json(plan, shown, command), indent=2))
        return
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH)
    console.print(
        f"{config.model.path}: {size.parameters:,} parameters; {cluster.gpus} {cluster.gpu.name}; a step: "
        f"{work.episodes:,} episodes of {work.episode_tokens:,.0f} tokens (assumed), {work.updates} updates",
        markup=False,
        highlight=False,
    )
    console.print(layouts_table(shown, refusal=plan.refusal))
    console.print(parts_table(plan.best))
    if runnable is not None and runnable is not plan.best:
        console.print(parts_table(runnable))
    for line in _conclusion(config, plan, command):
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def _model_of(path: str) -> str:
    """A folder or a name. The model that rlef ships is a folder too."""
    if path in NAMED:
        return path
    from rlef.pretrained import model_folder

    return str(model_folder(path))


def _conclusion(config: Config, plan: Plan, command: str | None) -> list[str]:
    if not plan.best.fits:
        return ["Nothing fits: take more GPUs, GPUs with more memory, or lower ppo.micro_batch_tokens."]
    lines = []
    if plan.refusal is not None:
        lines.append(f"The trainer cannot load this model today: {plan.refusal}")
    if command is None:
        if plan.refusal is None:
            lines.append(
                "No layout that the trainer can run today fits. The best needs: "
                + ", ".join(plan.best.missing)
            )
        return lines
    assert plan.runnable is not None
    hours = config.run.steps * plan.runnable.time.total / 3600
    lines.append(f"The best that runs today takes {hours:.1f} hours for {config.run.steps:,} steps:")
    return [*lines, command]


def chosen(plan: Plan, count: int) -> list[Candidate]:
    """The first `count`, one for each way to divide the model and the GPUs, and the best that runs today."""
    ways: dict[tuple[object, ...], Candidate] = {}
    for candidate in plan.candidates:
        layout = candidate.layout
        way = (layout.tensor, layout.pipeline, layout.colocated, layout.precision)
        ways.setdefault(way, candidate)
    first = list(ways.values())[:count]
    if plan.runnable is not None and plan.runnable not in first:
        first.append(plan.runnable)
    return first


def describe(layout: Layout) -> str:
    """A layout in a few words."""
    chunks = f"x{layout.virtual_pipeline}" if layout.virtual_pipeline > 1 else ""
    words = [f"TP{layout.tensor} PP{layout.pipeline}{chunks} DP{layout.data}"]
    words += ["SP"] if layout.sequence_parallel else []
    words += ["distributed optimiser"] if layout.distributed_optimizer else []
    words += ["recompute"] if layout.recompute else []
    words.append(layout.precision)
    if layout.colocated:
        words.append("colocated")
    else:
        words.append(f"{layout.training_gpus} train + {layout.sampling_gpus} sample")
    words.append("embedded sampler" if layout.whole_cache else f"sampler TP{layout.sampler_tensor}")
    return ", ".join(words)


def layouts_table(candidates: Sequence[Candidate], *, refusal: str | None) -> Table:
    """One row for each. With a `refusal` none of them runs."""
    table = Table(title="layouts, fastest first")
    for heading in ("layout", "GB", "fits", "s a step", "rollout", "scoring", "updates", "runs today"):
        table.add_column(heading, justify="left" if heading in {"layout", "runs today"} else "right")
    for candidate in candidates:
        time = candidate.time
        table.add_row(
            describe(candidate.layout),
            f"{max(candidate.memory.total, candidate.sampler_memory) / 1e9:.0f}",
            "yes" if candidate.fits else "no",
            f"{time.total:.1f}",
            f"{time.rollout + time.execution:.1f}",
            f"{time.scoring:.1f}",
            f"{time.updates:.1f}",
            _runs_today(candidate, refusal),
        )
    return table


def _runs_today(candidate: Candidate, refusal: str | None) -> str:
    if candidate.missing:
        return "needs " + ", ".join(candidate.missing)
    return "yes" if refusal is None else "not this model"


def parts_table(candidate: Candidate) -> Table:
    """Memory by part and time by phase of one candidate."""
    table = Table(title=describe(candidate.layout))
    table.add_column("memory of the fullest rank")
    table.add_column("GB", justify="right")
    table.add_column("phase")
    table.add_column("s", justify="right")
    memory = [*asdict(candidate.memory).items(), ("total", candidate.memory.total)]
    if not candidate.layout.colocated:
        memory.append(("total of a sampling rank", candidate.sampler_memory))
    time = asdict(candidate.time)
    del time["overlapped"]
    phases = [*time.items(), ("total", candidate.time.total)]
    for row in range(max(len(memory), len(phases))):
        cells = [_cells(memory, row, 1e9, 2), _cells(phases, row, 1.0, 2)]
        table.add_row(*cells[0], *cells[1])
    return table


def _cells(entries: Sequence[tuple[str, float]], row: int, unit: float, digits: int) -> tuple[str, str]:
    if row >= len(entries):
        return "", ""
    name, number = entries[row]
    return name.replace("_", " "), f"{number / unit:.{digits}f}"


def plan_as_json(plan: Plan, candidates: Sequence[Candidate], command: str | None) -> dict[str, Any]:
    """The same as the tables, for programs. Bytes and seconds."""
    return {
        "candidates": [
            {
                "layout": asdict(candidate.layout) | {"data": candidate.layout.data},
                "memory_bytes": asdict(candidate.memory) | {"total": candidate.memory.total},
                "sampler_memory_bytes": candidate.sampler_memory,
                "seconds": asdict(candidate.time) | {"total": candidate.time.total},
                "fits": candidate.fits,
                "missing": list(candidate.missing),
            }
            for candidate in candidates
        ],
        "work": asdict(plan.work),
        "cluster": asdict(plan.cluster),
        "refusal": plan.refusal,
        "command": command,
    }
