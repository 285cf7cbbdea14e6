"""Memory that a rank takes to load, write or publish a model, or a checkpoint: does it grow with its shard or
with the model?

    python bench/load_memory.py

Models of three depths are written in bfloat16, then read by the ranks of each layout into float32 Megatron
modules, gathered, and written by the first rank. Then the model as it learns, with gradients and moments, is
saved at once, saved by a thread, and read from the checkpoint that the layout before wrote. Every rank is a
process of its own, and reports how far its peak of resident memory, mapped files included, rose above where
it was before. To publish, a process that only samples stands beside those ranks: `send` and `receive` are
what it takes besides the shard, and besides the model that is sampled with. The last line is JSON: all
figures in MB (10^6 bytes), the largest of the ranks, and the least-squares fit

    peak = constant + per_shard * (bytes of the shard) + per_model * (bytes of the model)

whose `per_model` is what the promise is about. A model that is held as a whole makes it 1. Weights and
moments are three times the shard.

glibc keeps freed blocks of up to 32 MB for later, in holes that become more. So that what is measured is what
is held, the ranks run with a fixed MALLOC_MMAP_THRESHOLD_, above which it gives memory back at once;
`--keep-freed` leaves glibc as it is. (`rlef train` makes it keep all, for speed: `launch.py`.)
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rlef import checkpoint_files
from rlef.checkpoint import CheckpointStore
from rlef.config import Config, OptimizerConfig, ParallelConfig
from rlef.families import config_of, read_shape
from rlef.pieces import HeldState, Piece
from rlef.ports import ParallelState
from rlef.pretrained import StoredWeights, write_config, write_weights
from rlef.records import ModelShape
from rlef.shards import stage_weights

SHAPE = ModelShape(  # of one layer, 15 M weights
    model_type="qwen2",
    vocab_size=8192,
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=1,
    num_attention_heads=16,
    num_key_value_heads=4,
    head_dim=64,
    max_position_embeddings=128,
    rope_theta=1e6,
    rms_norm_eps=1e-6,
    tie_word_embeddings=False,
)
LAYOUTS = ((1, 1), (2, 1), (1, 2), (2, 2), (4, 1))  # tensor x pipeline
PUBLISHING = ((1, 1), (2, 1), (1, 2))  # the same, beside which there is room for a sampler
MB = 10**6
# Small beside the models, so that they do not hide what grows. A bucket has room for gate and up.
MAX_FILE_BYTES = 50 * MB
BUCKET_ELEMENTS = 2 * SHAPE.intermediate_size * SHAPE.hidden_size


def write_model(folder: Path, shape: ModelShape, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def weights() -> Iterator[tuple[str, Tensor]]:
        for weight in stage_weights(shape, "logits", stage=0, stages=1):
            for name, size in zip(weight.names, weight.shapes, strict=True):
                yield name, torch.empty(size).normal_(std=0.02, generator=generator).bfloat16()

    write_weights(folder, weights(), max_file_bytes=MAX_FILE_BYTES)
    write_config(folder, config_of(shape, end_token_id=1, pad_token_id=0, dtype=torch.bfloat16))


def measure(folder: Path, tensor: int, pipeline: int) -> None:
    """One rank: load, gather and write; leaves its figures beside the model."""
    from rlef.megatron_policy import MegatronNetwork, initialize

    state = initialize(ParallelConfig(tensor=tensor, pipeline=pipeline, processes=tensor * pipeline))
    shape, stored = read_shape(folder), StoredWeights(folder)
    forget_peak()
    start = resident("VmRSS")
    network = MegatronNetwork(shape, stored, head="logits")
    load = resident("VmHWM") - start
    shard = sum(piece.data.nbytes for piece in network.state_dict().pieces)
    forget_peak()
    named = network._gather(bucket_elements=BUCKET_ELEMENTS)  # noqa: SLF001
    if state.rank == 0:
        typed = ((name, whole.to(stored[name].dtype)) for name, whole in named)
        write_weights(folder / "written", typed, max_file_bytes=MAX_FILE_BYTES)
    else:
        deque(named, maxlen=0)
    figures = {"shard": shard, "load": load, "export": resident("VmHWM") - start}
    del network
    figures |= measure_checkpoints(folder, state, tensor, pipeline)
    (folder / f"rank-{state.rank}.json").write_text(json.dumps(figures))


def measure_publishing(folder: Path, tensor: int, pipeline: int) -> None:
    """One rank: a learner sends its weights, or the sampler takes them; leaves its figures as `measure`."""
    from rlef.bridge import LearnersEnd, SamplersEnd
    from rlef.job import join
    from rlef.megatron_policy import MegatronNetwork, initialize
    from rlef.torch_sampler import TorchSampler
    from rlef.words import Words

    parallel = ParallelConfig(
        tensor=tensor, pipeline=pipeline, processes=tensor * pipeline + 1, sampling_processes=1
    )
    config, job = Config(parallel=parallel), join(parallel)
    shape, stored = read_shape(folder), StoredWeights(folder)
    with Words(job, silence_s=600) as words:
        if job.only_samples:
            sampler = TorchSampler(shape, end_token_id=1, slots=1)
            sampler.push(stored.tensors(), version=0)
            samplers_end = SamplersEnd(job, config, words, shape)
            forget_peak()
            start = resident("VmRSS")
            dtype = samplers_end.next_order().details["dtype"]
            sampler.push(samplers_end.weights(dtype, bucket_elements=BUCKET_ELEMENTS), version=1)
            figures = {"receive": resident("VmHWM") - start}
        else:
            state = initialize(parallel)
            network = MegatronNetwork(shape, stored, head="logits")
            shard = sum(piece.data.nbytes for piece in network.state_dict().pieces)
            learners_end = LearnersEnd(job, config, words, state)
            forget_peak()
            start = resident("VmRSS")
            buckets = network._gather_stages(bucket_elements=BUCKET_ELEMENTS)  # noqa: SLF001
            learners_end.send_weights(buckets, version=1)
            figures = {"shard": shard, "send": resident("VmHWM") - start}
    (folder / f"rank-{job.rank}.json").write_text(json.dumps(figures))


def measure_checkpoints(folder: Path, state: ParallelState, tensor: int, pipeline: int) -> dict[str, int]:
    from rlef.megatron_policy import MegatronNetwork

    checkpoint_files.FILE_BYTES = MAX_FILE_BYTES
    shape, stored, optimizer = read_shape(folder), StoredWeights(folder), OptimizerConfig()
    network = MegatronNetwork(shape, stored, head="logits", optimizer=optimizer, lr=optimizer.lr)
    network.load_state_dict(Beginning(network.state_dict()))
    own = folder / "checkpoints" / f"{tensor}x{pipeline}"
    earlier = next(own.parent.glob("*"), own)  # of the layout before, if there was one
    torch.distributed.barrier()
    job = {"keep": 1, "rank": state.rank, "world_size": state.world_size}
    rose: dict[str, int] = {}
    for kind, asynchronous in (("save", False), ("save_asynchronous", True)):
        store = CheckpointStore(own, asynchronous=asynchronous, **job)
        start = resident("VmRSS")
        forget_peak()
        store.save(1, {"policy": network.state_dict()}, {})
        store.finish()
        rose[kind] = resident("VmHWM") - start
    checkpoint = CheckpointStore(earlier, **job).load_latest()
    assert checkpoint is not None
    start = resident("VmRSS")
    forget_peak()
    network.load_state_dict(checkpoint.states["policy"])
    rose["resume"] = resident("VmHWM") - start
    torch.distributed.barrier()
    if state.rank == 0 and earlier != own:
        shutil.rmtree(earlier)
    return rose


class Beginning:
    """A network's own weights, as after a step that moved nothing: so that it has moments."""

    def __init__(self, state: HeldState) -> None:
        self.facts = {**state.facts, "steps": 1}

    def read(self, targets: Iterable[Piece]) -> None:
        """What is there stays."""
        deque(targets, maxlen=0)


def resident(field: str) -> int:
    """Bytes of this process that are in memory now (VmRSS), or were at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def forget_peak() -> None:
    """From here on VmHWM is the peak since now (proc(5), clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5")


def ranks_of(
    folder: Path, tensor: int, pipeline: int, *, samplers: int, keep_freed: bool
) -> list[dict[str, int]]:
    ranks = tensor * pipeline + samplers
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += [__file__, "--measure", str(folder), "--tensor", str(tensor), "--pipeline", str(pipeline)]
    command += ["--publish"] * samplers
    exact = {} if keep_freed else {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"} | exact)
    if not samplers:
        compare(folder, folder / "written")
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(ranks)]


def compare(folder: Path, written: Path) -> None:
    """What was written must be what was read, bit for bit."""
    read, found = StoredWeights(folder), StoredWeights(written)
    for name in read.keys() | found.keys():
        if (
            name not in read
            or name not in found
            or not torch.equal(read[name][:].view(torch.int16), found[name][:].view(torch.int16))
        ):
            sys.exit(f"{name} was not written as it was read")
    for file in written.iterdir():
        file.unlink()


def fit(rows: list[dict[str, float]], what: str) -> dict[str, float]:
    known = np.array([[1.0, row["shard"], row["model"]] for row in rows])
    solution, *_ = np.linalg.lstsq(known, np.array([row[what] for row in rows]), rcond=None)
    names = ("constant", "per_shard", "per_model")
    return {name: round(float(number), 3) for name, number in zip(names, solution, strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8, 16], help="of each model")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep-freed", action="store_true", help="leave glibc's malloc as it is")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)  # this process is a rank
    parser.add_argument("--tensor", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--pipeline", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--publish", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        what = measure_publishing if arguments.publish else measure
        what(arguments.measure, arguments.tensor, arguments.pipeline)
        return

    rows: list[dict[str, float]] = []
    published: list[dict[str, float]] = []
    for layers in arguments.layers:
        with tempfile.TemporaryDirectory() as name:
            folder, shape = Path(name), replace(SHAPE, num_hidden_layers=layers)
            write_model(folder, shape, arguments.seed)
            stored = StoredWeights(folder)
            model = 4 * sum(weight.shape.numel() for weight in stored.values())
            for samplers, layouts, found in ((0, LAYOUTS, rows), (1, PUBLISHING, published)):
                for tensor, pipeline in layouts:
                    ranks = ranks_of(
                        folder, tensor, pipeline, samplers=samplers, keep_freed=arguments.keep_freed
                    )
                    largest = {
                        what: max(rank.get(what, 0) for rank in ranks) / MB for what in ranks[0] | ranks[-1]
                    }
                    found.append({"tensor": tensor, "pipeline": pipeline, "model": model / MB, **largest})
                    print({key: round(number) for key, number in found[-1].items()}, flush=True)
    result = {
        "bench": "load_memory",
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip(),
        "hardware": f"{platform.machine()}, {platform.system()} {platform.release()}",
        "versions": {name: version(name) for name in ("torch", "megatron-core", "safetensors")},
        "seed": arguments.seed,
        "keep_freed": arguments.keep_freed,
        "rows": [{key: round(number) for key, number in row.items()} for row in rows],
        "published": [{key: round(number) for key, number in row.items()} for row in published],
        "send": fit(published, "send"),
        "receive": fit(published, "receive"),
        "load": fit(rows, "load"),
        "export": fit(rows, "export"),
        "save": fit(rows, "save"),
        "save_asynchronous": fit(rows, "save_asynchronous"),
        "resume": fit(rows, "resume"),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
