"""How long a step waits for its checkpoint: written at once, or copied and written by a thread.

    python bench/checkpoint.py

One process saves weights and moments of `--megabytes` (10^6 bytes) in turn in both ways. Measured is the time
until the tensors may change again; what a thread writes is awaited before the next round begins. With
`--folder` on the disk of a run, the last line is JSON: medians of the seconds, their ratio in the same round,
and the seconds until the asynchronous one was whole.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch

from rlef.checkpoint import CheckpointStore
from rlef.pieces import HeldState, Piece

MB = 10**6
ROW = 1024  # numbers
MATRIX = 4096  # rows


def state_of(megabytes: int, seed: int) -> HeldState:
    """Matrices of 17 MB, as many as fit."""
    generator = torch.Generator().manual_seed(seed)
    count = max(1, megabytes * MB // (4 * ROW * MATRIX))
    pieces = [
        Piece(name=f"weight/{number}", offsets=(0, 0), data=torch.randn(MATRIX, ROW, generator=generator))
        for number in range(count)
    ]
    return HeldState(facts={}, pieces=pieces)


def save(folder: Path, state: HeldState, *, step: int, asynchronous: bool) -> tuple[float, float]:
    """Seconds until the tensors may change, and until the checkpoint is whole."""
    store = CheckpointStore(folder, keep=1, asynchronous=asynchronous)
    started = time.perf_counter()
    store.save(step, {"net": state}, {})
    waited = time.perf_counter() - started
    store.finish()
    return waited, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=int, default=1000, help="of weights and moments")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="on which disk to write; the temporary one if left out")
    arguments = parser.parse_args()
    state = state_of(arguments.megabytes, arguments.seed)
    rows: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        for number in range(arguments.rounds):
            at_once, _ = save(Path(name), state, step=2 * number + 1, asynchronous=False)
            copied, whole = save(Path(name), state, step=2 * number + 2, asynchronous=True)
            rows.append(
                {
                    "synchronous_s": at_once,
                    "asynchronous_s": copied,
                    "ratio": at_once / copied,
                    "until_whole_s": whole,
                }
            )
            print({key: round(number, 3) for key, number in rows[-1].items()}, flush=True)
    result = {
        "bench": "checkpoint",
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip(),
        "hardware": f"{platform.machine()}, {platform.system()} {platform.release()}",
        "versions": {name: version(name) for name in ("torch", "safetensors")},
        "seed": arguments.seed,
        "megabytes": sum(piece.data.nbytes for piece in state.pieces) // MB,
        "rounds": arguments.rounds,
        "median": {key: round(statistics.median(row[key] for row in rows), 3) for key in rows[0]},
        "spread": {
            key: [round(min(row[key] for row in rows), 3), round(max(row[key] for row in rows), 3)]
            for key in rows[0]
        },
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
