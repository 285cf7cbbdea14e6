"""What a run of configs/smollm2.toml takes, and what its model gives at the start.

    make smollm2
    .venv/bin/python bench/smollm2.py [SECTION.KEY=VALUE]...

Runs the file, but for these, in a temporary folder, and watches the processes: the most memory that all hold
together (their proportional set sizes, so that shared pages count once), and the CPU time between the lines
of metrics.jsonl, as machines are shared. Then one thread samples responses from the model, 8 and 32 at once.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import torch

from rlef import problems
from rlef.arithmetic import longest_dialog
from rlef.config import Config
from rlef.ports import Request, SamplingParams
from rlef.pretrained import model_folder, read_pretrained
from rlef.prompts import Dialog
from rlef.settings_file import load_config
from rlef.torch_sampler import TorchSampler

CONFIG = Path(__file__).parents[1] / "configs" / "smollm2.toml"
TICK_S = 1 / os.sysconf("SC_CLK_TCK")
POLL_S = 1.0  # it reads the page tables of gigabytes


def tree(root: int) -> Iterator[int]:
    """The process ids of a process and of all its descendants."""
    yield root
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for children in Path(f"/proc/{root}/task").glob("*/children"):
            for child in children.read_text().split():
                yield from tree(int(child))


def held_bytes(root: int) -> int:
    total = 0
    for pid in tree(root):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
    return total


def cpu_seconds(root: int) -> float:
    """Of a process and its descendants, those included that have ended and were waited for."""
    ticks = 0
    for pid in tree(root):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += sum(int(field) for field in fields[11:15])
    return ticks * TICK_S


def run(folder: Path, overrides: list[str]) -> dict[str, object]:
    """One run, watched."""
    command = [sys.executable, "-m", "rlef", "train", str(CONFIG), f"run.output_dir={folder}", *overrides]
    metrics = folder / load_config(CONFIG).run.name / "metrics.jsonl"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    started, peak, at_step = time.monotonic(), 0, []
    process = subprocess.Popen(command, env=environment, stdout=sys.stderr)
    used = 0.0
    while process.poll() is None:
        peak, used = max(peak, held_bytes(process.pid)), max(used, cpu_seconds(process.pid))
        lines = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
        at_step += [used] * (lines - len(at_step))
        time.sleep(POLL_S)
    if process.returncode:
        raise SystemExit(f"the run ended with status {process.returncode}")
    steps = [json.loads(line) for line in metrics.read_text().splitlines()]
    summary = json.loads((metrics.parent / "summary.json").read_text())
    start = summary["start"]
    return {
        "wall_s": round(time.monotonic() - started),
        "cpu_s": round(used),
        "cpu_s_of_second_step": round(at_step[1] - at_step[0], 1),
        "wall_s_of_steps": [round(step["seconds"], 1) for step in steps],
        "sampled_tokens": [step["sampled_tokens"] for step in steps],
        "reward_of_steps": [step["reward"] for step in steps],
        "kl_of_steps": [step["kl"] for step in steps],
        "peak_memory_gb": round(peak / 1e9, 2),
        "checkpoint_gb": round(
            sum(f.stat().st_size for f in metrics.parent.glob("checkpoints/*/*")) / 1e9, 2
        ),
        "start": {name: start[name] for name in ("1@1", "1@2", "mean_reward", "mean_response_tokens")},
        "outcomes_of_first_turns": start["conditions"]["true_feedback"]["outcomes"][0],
    }


def tokens_per_cpu_second(config: Config, slots: int) -> float:
    """Of responses of up to 64 tokens, prompts included in the time."""
    folder = model_folder(config.model.path)
    shape, weights = read_pretrained(folder)
    dialog = Dialog.read(folder, config.rollout)
    sampler = TorchSampler(
        shape, end_token_id=dialog.end_token_id, slots=slots, context=longest_dialog(config)
    )
    sampler.push(weights.items(), version=0)
    statements = [problem.statement for problem in problems.load(config, "train")]
    requests = [
        Request(stream=stream, token_ids=dialog.prompt(statements[stream % len(statements)]))
        for stream in range(2 * slots)
    ]
    params = SamplingParams(temperature=1.0, top_p=1.0, max_tokens=config.rollout.max_response_tokens, seed=1)
    started = time.process_time()
    responses = sampler.generate(requests, params)
    return sum(len(response.token_ids) for response in responses) / (time.process_time() - started)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", metavar="SECTION.KEY=VALUE")
    overrides = parser.parse_args().overrides
    with tempfile.TemporaryDirectory() as folder:
        figures = run(Path(folder), overrides)
    torch.set_num_threads(1)
    config = load_config(CONFIG, overrides)
    speeds = {str(slots): round(tokens_per_cpu_second(config, slots), 1) for slots in (8, 32)}
    print(
        json.dumps(
            {
                **figures,
                "tokens_per_cpu_second": speeds,
                "cpu": platform.processor() or platform.machine(),
                "cores": len(os.sched_getaffinity(0)),
                "load_average": os.getloadavg()[0],
                "versions": {name: version(name) for name in ("torch", "megatron-core", "gguf")},
            }
        )
    )


if __name__ == "__main__":
    main()
