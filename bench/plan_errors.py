"""Predictions of `rlef plan` beside what others have published: the errors that docs/plan.md lists.

    python bench/plan_errors.py [--assume NAME=NUMBER]...

A case tells the plan what its source says about model, GPUs, layout, batch and lengths; what the source does
not say is in the docstrings here. Those of the use `calibration` helped to choose an assumption, the others
did not. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from rlef.plan_cluster import GPUS, Assumptions, Cluster, with_assumptions
from rlef.plan_memory import Layout, cache_capacity
from rlef.plan_model import read_model
from rlef.plan_time import DecodeStep, StepTime, Workload, step_time, updates_s

Use = Literal["calibration", "check"]
NEMO = "NeMo RL performance summary"
VERL = "verl docs"
PAPER = "arXiv 2410.02089"


@dataclass(frozen=True, slots=True, kw_only=True)
class Error:
    """One published figure and its prediction, both in `unit`."""

    name: str
    source: str
    use: Use
    published: float
    predicted: float
    unit: str

    @property
    def error(self) -> float:
        """As a share of what was published; negative when too little was predicted."""
        return self.predicted / self.published - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A run that somebody measured, as the plan is told about it."""

    name: str
    source: str
    use: Use
    model: str
    cluster: Cluster
    layout: Layout
    work: Workload
    sampler_memory_share: float  # of a GPU's memory, that the sampler may take
    seconds: float  # published, of one step

    def predict(self, assumptions: Assumptions) -> StepTime:
        size, gpu = read_model(self.model), self.cluster.gpu
        taken = (1 - self.sampler_memory_share) * gpu.memory_bytes
        tokens = cache_capacity(size, self.layout, assumptions, gpu, taken)
        return step_time(size, self.cluster, self.layout, self.work, assumptions, cache_tokens=tokens)


def nemo(
    release: str,
    model: str,
    gpu: str,
    gpus: int,
    mean_tokens: int,
    seconds: float,
    *,
    asynchronous: bool = False,
    use: Use = "check",
) -> Case:
    """GRPO on OpenMathInstruct-2: 2,048 responses a step in 4 updates, at most 4,096 tokens with the prompt.

    Layouts, packs of 4,096 tokens, recomputation (8B), the distributed optimiser, the sampler's share of
    memory and the even division of GPUs in asynchronous runs are those of the page and of the recipes beside
    it.
    Assumed: prompts of 150 tokens. There is no value network, and nothing is executed.
    """
    small, prompt = model == "llama-3.1-8b", 150
    tensor, pipeline, sampler_tensor = {
        ("llama-3.1-8b", "H100"): (1, 1 if asynchronous and release == "v0.5" else 2, 1),
        ("llama-3.1-8b", "GB200"): (1, 1, 1),
        ("qwen3-32b", "H100"): (4, 4, 4),
        ("qwen3-32b", "GB200"): (2, 1, 1),
    }[model, gpu]
    trainers = gpus // 2 if asynchronous else gpus
    per_node = 4 if gpu == "GB200" else 8
    return Case(
        name=f"NeMo RL {release}, {model}, {gpus} {gpu}, {'1 step off' if asynchronous else 'on policy'}",
        source=NEMO,
        use=use,
        model=model,
        cluster=Cluster(gpu=GPUS[gpu], nodes=gpus // per_node, gpus_per_node=per_node),
        layout=Layout(
            tensor=tensor,
            pipeline=pipeline,
            training_gpus=trainers,
            sampling_gpus=gpus - trainers if asynchronous else gpus,
            sampler_tensor=sampler_tensor,
            colocated=not asynchronous,
            distributed_optimizer=True,
            sequence_parallel=tensor > 1,
            recompute=small,
        ),
        work=Workload(
            episodes=2048,
            updates=4,
            turns=1,
            max_turns=1,
            prompt_tokens=prompt,
            response_tokens=mean_tokens - prompt,
            max_response_tokens=4096 - prompt,
            feedback_tokens=0,
            longest_tokens=4096,
            micro_batch_tokens=4096,
            slots=1024,
            has_value=False,
            executes=False,
        ),
        sampler_memory_share=0.8 if asynchronous else 0.6,
        seconds=seconds,
    )


# GPUs, mean tokens of a sequence with its prompt, seconds of a step.
NEMO_CASES = (
    nemo("v0.4", "llama-3.1-8b", "H100", 16, 1060, 97.7, use="calibration"),
    nemo("v0.4", "llama-3.1-8b", "H100", 16, 1129, 74.6, asynchronous=True, use="calibration"),
    nemo("v0.4", "qwen3-32b", "H100", 32, 3206, 393),
    nemo("v0.4", "qwen3-32b", "H100", 64, 3207, 215, asynchronous=True),
    nemo("v0.5", "llama-3.1-8b", "H100", 16, 1019, 92.8),
    nemo("v0.5", "llama-3.1-8b", "H100", 16, 1123, 64.8, asynchronous=True),
    nemo("v0.5", "qwen3-32b", "H100", 32, 3251, 376),
    nemo("v0.5", "qwen3-32b", "H100", 64, 3252, 200, asynchronous=True),
    nemo("v0.5", "llama-3.1-8b", "GB200", 8, 1066, 91.0),
    nemo("v0.5", "llama-3.1-8b", "GB200", 8, 1107, 71.1, asynchronous=True),
    nemo("v0.5", "qwen3-32b", "GB200", 16, 3253, 381),
    nemo("v0.5", "qwen3-32b", "GB200", 32, 3258, 210, asynchronous=True),
)


def paper(model: str, trainers: int, samplers: int, updates: int, *, tensor: int, pipeline: int) -> Case:
    """RLEF's own run: 20 hours, 1,024 episodes of up to 3 turns a step, 4 updates of 256 sequences.

    The paper gives no lengths and no layout. Lengths are the shares of rlef's default limits that the plan
    assumes everywhere; the layout is one that fits into 80 GB.
    """
    assumptions = Assumptions()
    return Case(
        name=f"RLEF, {model}, {trainers} + {samplers} H100",
        source=PAPER,
        use="check",
        model=model,
        cluster=Cluster(gpu=GPUS["H100"], nodes=(trainers + samplers) // 8),
        layout=Layout(
            tensor=tensor,
            pipeline=pipeline,
            training_gpus=trainers,
            sampling_gpus=samplers,
            sampler_tensor=tensor,
            colocated=False,
            distributed_optimizer=True,
            sequence_parallel=True,
            recompute=True,
        ),
        work=Workload(
            episodes=1024,
            updates=4,
            turns=3 * assumptions.turn_share,
            max_turns=3,
            prompt_tokens=2048 * assumptions.prompt_share,
            response_tokens=1024 * assumptions.response_share,
            max_response_tokens=1024,
            feedback_tokens=1024 * assumptions.feedback_share,
            longest_tokens=2048 + 3 * 1024 + 2 * 1025,
            micro_batch_tokens=16384,
            slots=128,
        ),
        sampler_memory_share=1.0,
        seconds=20 * 3600 / (updates / 4),
    )


PAPER_CASES = (
    paper("llama-3.1-8b", 128, 160, 12_000, tensor=2, pipeline=1),
    paper("llama-3.1-70b", 1024, 1280, 8_000, tensor=8, pipeline=2),
)


def longest(case: Case) -> Case:
    """The same run, if every dialog were as long as the limits allow: the most that it could take."""
    work = replace(
        case.work,
        turns=3,
        prompt_tokens=2048,
        response_tokens=1024,
        feedback_tokens=1024,
    )
    return replace(case, name=f"{case.name}, longest dialogs", work=work)


@dataclass(frozen=True, slots=True, kw_only=True)
class VerlRow:
    """DAPO, Qwen2.5-Math-7B on H20: 512 prompts of 16 responses a step, updates of 32 prompts.

    The page gives seconds by phase and the longest response, but not the mean. So the mean is taken from the
    seconds of the updates, and what is predicted are the other two phases: the rollout, and the old
    log-probabilities, one forward pass. Assumed: prompts of 200 tokens; the sequence parallelism of FSDP
    costs nothing.
    """

    name: str
    source: str
    gpus: int
    max_response_tokens: int
    megatron: bool
    scoring_s: float
    rollout_s: float
    updates_s: float

    def case(self, response_tokens: float) -> Case:
        split = 2 if self.megatron else 1
        return Case(
            name=self.name,
            source=self.source,
            use="check",
            model="qwen2.5-7b",
            cluster=Cluster(gpu=GPUS["H20"], nodes=self.gpus // 8),
            layout=Layout(
                tensor=split,
                pipeline=split,
                training_gpus=self.gpus,
                sampling_gpus=self.gpus,
                sampler_tensor=2,
                distributed_optimizer=True,
                recompute=not self.megatron,
            ),
            work=Workload(
                episodes=8192,
                updates=16,
                turns=1,
                max_turns=1,
                prompt_tokens=200,
                response_tokens=response_tokens,
                max_response_tokens=self.max_response_tokens,
                feedback_tokens=0,
                longest_tokens=200 + self.max_response_tokens,
                micro_batch_tokens=16384,
                slots=1024,
                has_value=False,
                has_reference=False,
                executes=False,
            ),
            sampler_memory_share=0.8,
            seconds=self.scoring_s + self.rollout_s + self.updates_s,
        )

    def mean_response_tokens(self, assumptions: Assumptions) -> float:
        """Such that the updates take the published time, by bisection."""
        low, high = 1.0, float(self.max_response_tokens)
        for _ in range(60):
            middle = math.sqrt(low * high)
            case = self.case(middle)
            size = read_model(case.model)
            seconds = updates_s(size, case.cluster, case.layout, case.work, assumptions)
            if seconds * assumptions.step_overhead < self.updates_s:
                low = middle
            else:
                high = middle
        return low


ONE_STEP, FULLY = f"{VERL}, one_step_off", f"{VERL}, fully_async"
VERL_ROWS = tuple(
    VerlRow(
        name=f"verl, {gpus} H20, {'Megatron' if megatron else 'FSDP2'}, up to {longest_response:,} tokens",
        source=source,
        gpus=gpus,
        max_response_tokens=longest_response,
        megatron=megatron,
        scoring_s=scoring,
        rollout_s=rollout,
        updates_s=updates,
    )
    for source, gpus, longest_response, megatron, scoring, rollout, updates in (
        (ONE_STEP, 16, 8192, True, 119, 207, 344),
        (ONE_STEP, 16, 20480, False, 88, 321, 286),
        (FULLY, 32, 28672, False, 107.71, 357.41, 269.80),
        (FULLY, 64, 28672, False, 70.26, 150.72, 133.41),
        (FULLY, 128, 28672, False, 53.92, 177.85, 113.81),
    )
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenTime:
    """Milliseconds per token of a vLLM server at a small batch, bf16."""

    name: str
    source: str
    use: Use
    model: str
    gpu: str
    memory_bandwidth: float
    batch: int
    sampler_tensor: int
    context: float
    milliseconds: float

    def predict(self, assumptions: Assumptions) -> float:
        gpu = replace(GPUS[self.gpu], memory_bandwidth=self.memory_bandwidth)
        layout = Layout(sampler_tensor=self.sampler_tensor)
        cluster = Cluster(gpu=gpu, nodes=1)
        step = DecodeStep(read_model(self.model), cluster, layout, assumptions, self.context)
        return 1000 * step(self.batch)


BUILD = "vLLM performance benchmark, build 9515 (833.4 and 2,077.5 ms for 128 tokens)"
TOKEN_TIMES = (
    TokenTime(
        name="vLLM, llama-3.1-8b, H100, batch 1",
        source="InferenceBench, concurrency sweep, vLLM 0.21 (2026-05)",
        use="calibration",
        model="llama-3.1-8b",
        gpu="H100",
        memory_bandwidth=3.35e12,
        batch=1,
        sampler_tensor=1,
        context=256,
        milliseconds=6.48,
    ),
    TokenTime(
        name="vLLM, llama-3.1-8b, A100 40 GB, batch 1",
        source="J. Musgrave, throughput-latency sweep, vLLM 0.23 (75 tokens/s)",
        use="calibration",
        model="llama-3.1-8b",
        gpu="A100",
        memory_bandwidth=1.555e12,
        batch=1,
        sampler_tensor=1,
        context=1088,
        milliseconds=1000 / 75,
    ),
    TokenTime(
        name="vLLM, llama-3.1-8b, H200, batch 8",
        source=BUILD,
        use="calibration",
        model="llama-3.1-8b",
        gpu="H200",
        memory_bandwidth=4.8e12,
        batch=8,
        sampler_tensor=1,
        context=96,
        milliseconds=833.421 / 128,
    ),
    TokenTime(
        name="vLLM, llama-3.1-70b, 4 H200, batch 8",
        source=BUILD,
        use="calibration",
        model="llama-3.1-70b",
        gpu="H200",
        memory_bandwidth=4.8e12,
        batch=8,
        sampler_tensor=4,
        context=96,
        milliseconds=2077.53 / 128,
    ),
)


# vLLM 0.8.2 on an H100, Qwen2.5-VL 7B: QwenLM/Qwen3-VL, issue 1057 (2025-04). It has a vision tower besides.
CACHE_TOKENS, MODEL_GIB = 905_648, 15.6271
VISION_BYTES = MODEL_GIB * 2**30 - 2 * read_model("qwen2.5-7b").parameters


def errors(assumptions: Assumptions) -> Iterator[Error]:
    """All cases, in the order of docs/plan.md."""
    for point in TOKEN_TIMES:
        yield Error(
            name=point.name,
            source=point.source,
            use=point.use,
            published=point.milliseconds,
            predicted=point.predict(assumptions),
            unit="ms a token",
        )
    yield Error(
        name="vLLM, qwen2.5-vl-7b, H100, tokens of its cache",
        source="QwenLM/Qwen3-VL, issue 1057",
        use="check",
        published=CACHE_TOKENS,
        predicted=cache_capacity(
            read_model("qwen2.5-7b"), Layout(), assumptions, GPUS["H100"], taken=VISION_BYTES
        ),
        unit="tokens",
    )
    for case in (*NEMO_CASES, *PAPER_CASES, *(longest(case) for case in PAPER_CASES)):
        predicted = case.predict(assumptions).total
        yield _of_step(case, "", case.seconds, predicted)
    for row in VERL_ROWS:
        case = row.case(row.mean_response_tokens(assumptions))
        time = case.predict(assumptions)
        rollout = _of_step(case, ": rollout", row.rollout_s, time.rollout)
        yield replace(rollout, use="calibration")  # of the rule that some response runs to its limit
        yield _of_step(case, ": scoring", row.scoring_s, time.scoring)


def _of_step(case: Case, phase: str, published: float, predicted: float) -> Error:
    return Error(
        name=case.name + phase,
        source=case.source,
        use=case.use,
        published=published,
        predicted=predicted,
        unit="s a step",
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--assume", action="append", default=[], metavar="NAME=NUMBER")
    assumptions = with_assumptions(parser.parse_args().assume)
    found = list(errors(assumptions))
    for entry in found:
        print(
            f"{entry.name:<58} {entry.use:<11} {entry.published:8.1f} {entry.predicted:8.1f} "
            f"{entry.unit:<10} {100 * entry.error:+4.0f} %"
        )
    for row in VERL_ROWS:
        print(
            f"{row.name}: mean response of {row.mean_response_tokens(assumptions):,.0f} tokens, by the plan"
        )
    print(json.dumps({entry.name: round(entry.error, 3) for entry in found}))


if __name__ == "__main__":
    main()
