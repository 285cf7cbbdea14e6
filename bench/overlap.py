"""How long trainers wait for episodes: in lockstep, with overlap, and with stale rollouts.

    python -m bench.overlap [--only machine cluster] [--ranks 8 64 512] [--seeds 1 2 3] [--rounds 3]

`machine`: short runs of configs/tiny.toml on this machine's cores, everything real. The schedules take turns;
of each run the steps count that begin when the pipeline is full.

`cluster`: rlef's own rollouts on sleeping engines (bench/simulated_cluster.py), against what no schedule can
beat. The latencies are those of a step that the paper's 8B run had (24 s: 3,000 steps in about 20 hours). A
share of waiting is what is left of the time when learning and pushing are taken off as they were injected, so
what this machine adds counts as waiting, too; how much that is, the same without latencies says. If a
simulation beats its bound, one of the two is wrong, and the bench fails.

The last line of standard output is JSON: medians over rounds or seeds, with the smallest and the largest.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from bench.simulated_cluster import Cluster, Habits, disaggregated, least_seconds, simulate
from rlef.config import RolloutConfig
from rlef.pretrained import model_folder
from rlef.prompts import Dialog
from rlef.telemetry import METRICS_FILE, read_metrics

ROOT = Path(__file__).parents[1]
SCHEDULES = {
    "lockstep": (),
    "overlap": ("rollout.overlap=true",),
    "max_staleness 1": ("rollout.max_staleness=1",),
    "max_staleness 2": ("rollout.max_staleness=2",),
}
HERE = SCHEDULES | {  # one of the two processes learns, the other samples
    "apart, max_staleness 0": ("parallel.sampling_processes=1",),
    "apart, max_staleness 1": ("parallel.sampling_processes=1", "rollout.max_staleness=1"),
}
SHORT = ("run.steps=6", "rollout.episodes_per_step=64", "problems.eval_size=4", "checkpoint.every_steps=100")
FILLING = 3  # first steps that do not count: the oldest episodes are then two versions old

STEP = Cluster(
    samplers=0,  # of each row
    slots=64,
    episodes=512,  # half the paper's: one for each of 512 ranks
    steps=5,
    token_s=0.02,
    learning_s=22.0,
    push_s=2.0,
)
TRAINERS = 128 / (128 + 160)  # the paper's share of ranks that learn, where others sample


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=("machine", "cluster"), default=["machine", "cluster"])
    parser.add_argument("--rounds", type=int, default=3, help="of the runs on this machine")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 512])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of simulated lengths")
    arguments = parser.parse_args()
    report: dict[str, Any] = {
        "bench": "overlap",
        "commit": _commit(),
        "hardware": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, 2 cores in use",
        "versions": {"python": platform.python_version(), "torch": version("torch")},
    }
    if "machine" in arguments.only:
        report |= {"rounds": arguments.rounds, "machine": on_this_machine(arguments.rounds)}
    if "cluster" in arguments.only:
        report |= {"seeds": arguments.seeds, "cluster": in_a_cluster(arguments.ranks, arguments.seeds)}
    print(json.dumps(report))
    beaten = [row for row in report.get("cluster", []) if row["least_over_bound"] < 1]
    for row in beaten:
        print(f"faster than anything can be, so the bench is wrong: {row}", file=sys.stderr)
    return 1 if beaten else 0


def on_this_machine(rounds: int) -> list[dict[str, Any]]:
    """Per schedule: seconds a step, its ratio to lockstep in the same round, and the share of waiting."""
    seconds: dict[str, list[float]] = {name: [] for name in HERE}
    waiting: dict[str, list[float]] = {name: [] for name in HERE}
    for _ in range(rounds):
        for name, settings in HERE.items():
            with tempfile.TemporaryDirectory() as folder:
                steps = [stats.metrics for stats in train(Path(folder), settings)][FILLING:]
            seconds[name].append(statistics.mean(step["seconds"] for step in steps))
            waiting[name].append(statistics.mean(step["seconds/waiting"] for step in steps))
            print(f"{name}: {seconds[name][-1]:.2f} s a step, waiting {waiting[name][-1]:.2f} s", flush=True)
    print("\n| on this machine | seconds a step | against lockstep | waiting |\n|---|---|---|---|")
    rows = []
    for name in HERE:
        ratios = [own / base for own, base in zip(seconds[name], seconds["lockstep"], strict=True)]
        shares = [waited / whole for waited, whole in zip(waiting[name], seconds[name], strict=True)]
        row = {"schedule": name, "seconds": _spread(seconds[name]), "ratio": _spread(ratios)}
        rows.append(row | {"waiting": _spread(shares)})
        print(f"| {name} | {_shown(seconds[name])} | {_shown(ratios)} | {_shown(shares)} |", flush=True)
    return rows


def train(folder: Path, settings: Sequence[str]) -> list[Any]:
    """The metrics of a short run."""
    command = [sys.executable, "-m", "rlef", "train", str(ROOT / "configs" / "tiny.toml")]
    overrides = [*SHORT, *settings, f"run.output_dir={folder}", "run.name=run"]
    done = subprocess.run([*command, *overrides], capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"rlef train ended with status {done.returncode}:\n{done.stdout}{done.stderr}")
    return read_metrics(folder / "run" / METRICS_FILE)


def in_a_cluster(sizes: Sequence[int], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Per number of ranks, topology and schedule: the share of waiting and its bound."""
    dialog = Dialog.read(model_folder("embedded"), RolloutConfig())
    print(
        "\n| ranks | topology | schedule | waiting | bound | for its own | without latencies |\n"
        + "|---" * 7
        + "|"
    )
    rows = []
    for ranks in sizes:
        whole = replace(STEP, samplers=ranks)
        apart = disaggregated(whole, trainers=max(1, round(ranks * TRAINERS)))
        overhead_s = _overhead_s(whole, seeds[0], dialog)
        for topology, cluster in (("colocated", whole), ("disaggregated", apart)):
            for schedule in SCHEDULES:
                if topology == "disaggregated" and schedule == "lockstep":
                    continue  # what overlaps with nothing is no reason to sample elsewhere
                row = {"ranks": ranks, "topology": topology, "schedule": schedule, "overhead_s": overhead_s}
                rows.append(row | _against_bound(_scheduled(cluster, schedule), seeds, dialog, ranks))
                _print_row(rows[-1])
    return rows


def _scheduled(cluster: Cluster, schedule: str) -> Cluster:
    if schedule == "lockstep" or schedule == "overlap":
        return replace(cluster, schedule=schedule)
    return replace(cluster, max_staleness=int(schedule.rpartition(" ")[2]))


def _against_bound(cluster: Cluster, seeds: Sequence[int], dialog: Dialog, ranks: int) -> dict[str, Any]:
    """Shares of waiting, measured and least; and the smallest ratio of measured seconds to the bound's."""
    scale = _scale(ranks)
    learning_s = cluster.steps * (cluster.learning_s + cluster.push_s)
    shares, bounds, ratios, own, stale = [], [], [], [], []
    for seed in seeds:
        courses = [Habits().course(seed, number) for number in range(cluster.steps * cluster.episodes)]
        found = simulate(cluster, courses, dialog, scale=scale)
        least = least_seconds(cluster, courses)
        ratios.append(found.seconds / (scale * least))
        shares.append(1 - learning_s * scale / found.seconds)
        bounds.append(1 - learning_s / least)
        own.append(found.own_waiting_s / found.seconds)
        stale.append(found.staleness_max)
    return {
        "samplers": cluster.samplers,
        "waiting": _spread(shares),
        "waiting_for_own": _spread(own),
        "bound": _spread(bounds),
        "least_over_bound": min(ratios),
        "staleness_max": max(stale),
        "scale": scale,
    }


def _scale(ranks: int) -> float:
    """How long a second of the cluster takes here, so that this machine can keep pace."""
    return max(0.1, ranks / 2048)


def _overhead_s(cluster: Cluster, seed: int, dialog: Dialog) -> float:
    """What this machine alone takes for a step, in seconds of the cluster: everything but the latencies."""
    courses = [Habits().course(seed, number) for number in range(cluster.steps * cluster.episodes)]
    seconds = simulate(_scheduled(cluster, "max_staleness 1"), courses, dialog, scale=0.0).seconds
    return round(seconds / cluster.steps / _scale(cluster.samplers), 2)


def _print_row(row: dict[str, Any]) -> None:
    shares = [_cell(row[name]) for name in ("waiting", "bound", "waiting_for_own")]
    cells = [row["ranks"], row["topology"], row["schedule"], *shares, f"{row['overhead_s']} s a step"]
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def _spread(values: Sequence[float]) -> list[float]:
    """Median, smallest, largest."""
    return [round(value, 3) for value in (statistics.median(values), min(values), max(values))]


def _shown(values: Sequence[float]) -> str:
    return _cell(_spread(values))


def _cell(spread: Sequence[float]) -> str:
    median, low, high = spread
    return f"{median:.2f} [{low:.2f}, {high:.2f}]"


def _commit() -> str:
    return subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False, cwd=ROOT
    ).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
