"""The kernels of the policy loss."""

from __future__ import annotations

from collections.abc import Mapping

from bench.configurations.common import MOST_OF_DRAM, SIZES
from bench.machine_code import TARGETS, Configuration, Stream
from rlef_kernels import _logprobs_triton as logprobs
from rlef_kernels import _policy_rows_triton as policy_rows
from rlef_kernels import _policy_shards_triton as policy_shards
from rlef_kernels import _policy_triton as policy


def of_policy() -> list[Configuration]:
    """From logits of every type, with and without bonus; rows, odd vocabularies and doubles once each."""
    found = [
        _policy_rows(element, bonus=bonus) for element in ("bf16", "fp16", "fp32") for bonus in (True, False)
    ]
    found += [_policy_rows("bf16", rows=True), _policy_rows("bf16", divisible=False), _policy_rows("fp64")]
    found += [_policy_rows("bf16", stores=False)]
    for element in ("bf16", "fp32"):
        found += [_policy_shard("statistics", element), _policy_shard("gradient", element)]
        found += [_policy_tokens(element)]
    return [*found, _policy_shard_tokens(), _policy_total(), _policy_scale("bf16"), _policy_scale("fp32")]


# Arguments of the kernels of the policy loss, every option taken.
POLICY_TOKENS = {
    "mask_ptr": "*u8",
    "old_ptr": "*fp32",
    "behaviour_ptr": "*fp32",
    "advantages_ptr": "*fp32",
} | {
    "weights_ptr": "*fp32",
    "reference_ptr": "*fp32",
    "normaliser_ptr": "*fp32",
}
# A third of what its loops move comes from the L2 cache, so that this is MOST_OF_DRAM of the rest.
POLICY_MOST_OF_DRAM = {"sm_90": 0.70 * 2 / 3}
POLICY_NUMBERS = dict.fromkeys(("divisor", "low", "high", "dual_clip", "entropy_coef", "kl_coef"), "fp64")


def _policy_rows(
    element: str,
    *,
    bonus: bool = True,
    rows: bool = False,
    divisible: bool = True,
    stores: bool = True,
) -> Configuration:
    size, sums = SIZES[element], "*fp64" if element == "fp64" else "*fp32"
    words = [*["entropy"] * bonus, *["rows"] * rows, *["odd"] * (not divisible), *["forward"] * (not stores)]
    return Configuration(
        name=" ".join(["policy rows", element, *words]),
        kernel=policy_rows.rows_kernel,
        arguments={
            "gradient_ptr": f"*{element}" if stores else None,
            "sums_ptr": sums,
            "logits_ptr": f"*{element}",
            "targets_ptr": "*i64",
            "tokens_ptr": "*i64" if rows else None,
            **{name: sums if kind == "*fp32" else kind for name, kind in POLICY_TOKENS.items()},
            "stride_gradient": "i64",
            "stride_row": "i64",
            "vocab": "i32",
            "inverse_temperature": "fp64",
            **POLICY_NUMBERS,
        },
        constants={
            "KL": "k3",
            "WANT_ENTROPY": bonus,
            "HAS_BONUS": bonus,
            "ALIGNED": divisible,
            "TOGETHER": True,
        },
        settings=lambda device: policy_rows.launch_settings(size, device.warp_size),
        divisible=frozenset({"stride_gradient", "stride_row", "vocab"} if divisible else ()),
        stream=Stream(
            elements=_elements_of_rows,
            loaded=2 * size if stores else size,
            stored=size if stores else 0,
            loops=2 if stores else 1,
            pipe_over_dram=POLICY_MOST_OF_DRAM if element != "fp64" and stores else {},
        ),
        # Without the gradient's loop, the reader takes another piece of gfx942's code for one.
        targets=tuple(TARGETS) if stores else ("sm_80", "sm_90", "sm_100"),
    )


def _elements_of_rows(settings: Mapping[str, int]) -> int:
    return settings["LOADS"] * settings["THREADS"] * settings["WORDS"]


def _policy_shard(step: str, element: str) -> Configuration:
    size, writes = SIZES[element], step == "gradient"
    loads = logprobs.LOADS_OF_GRADIENT if writes else logprobs.LOADS_OF_STATISTICS
    own = {"gradient_ptr": f"*{element}", "coefficients_ptr": "*fp32", "stride_gradient": "i64"}
    return Configuration(
        name=f"policy shard {step} {element}",
        kernel=policy_shards.shard_gradient_kernel if writes else policy_shards.shard_statistics_kernel,
        arguments={
            **(own if writes else {"statistics_ptr": "*fp32"}),
            "logits_ptr": f"*{element}",
            "targets_ptr": "*i64",
            "tokens_ptr": "*i64",
            "mask_ptr": "*u8",
            "stride_row": "i64",
            "num_tokens": "i32",
            "vocab": "i32",
            "first_word": "i32",
            "inverse_temperature": "fp64",
        },
        constants={
            "ALIGNED": True,
            **({"HAS_BONUS": True, "TOGETHER": True} if writes else {"WANT_ENTROPY": True}),
        },
        settings=lambda device: logprobs.launch_settings(size, loads, device.warp_size),
        divisible=frozenset(
            {"stride_gradient", "stride_row", "vocab"} if writes else {"stride_row", "vocab"}
        ),
        stream=Stream(
            elements=_elements_of_rows,
            loaded=size,
            stored=size if writes else 0,
            pipe_over_dram=MOST_OF_DRAM,
        ),
    )


def _policy_tokens(element: str) -> Configuration:
    return Configuration(
        name=f"policy tokens {element}",
        kernel=policy.tokens_kernel,
        arguments={
            **dict.fromkeys(("sums_ptr", "for_logprobs_ptr", "for_entropy_ptr"), "*fp32"),
            **dict.fromkeys(("logprobs_ptr", "entropy_ptr"), f"*{element}"),
            **POLICY_TOKENS,
            "num_tokens": "i32",
            **POLICY_NUMBERS,
        },
        constants={"KL": "k3"},
        settings=lambda _: {"BLOCK": policy.BLOCK, "num_warps": 4},
    )


def _policy_shard_tokens() -> Configuration:
    return Configuration(
        name="policy shard tokens",
        kernel=policy_shards.shard_tokens_kernel,
        arguments={
            **dict.fromkeys(("sums_ptr", "coefficients_ptr", "statistics_ptr"), "*fp32"),
            "targets_ptr": "*i64",
            **POLICY_TOKENS,
            "num_tokens": "i32",
            "ranks": "i32",
            "vocab": "i32",
            "inverse_temperature": "fp64",
            **POLICY_NUMBERS,
        },
        constants={"KL": "k3", "WANT_ENTROPY": True},
        settings=lambda _: {"BLOCK": policy.BLOCK, "num_warps": 4},
    )


def _policy_total() -> Configuration:
    return Configuration(
        name="policy total",
        kernel=policy.total_kernel,
        arguments={
            **dict.fromkeys(("totals_ptr", "sums_ptr", "normaliser_ptr"), "*fp32"),
            "num_programs": "i32",
            "divisor": "fp64",
        },
        settings=lambda _: {"BLOCK": policy.TOTAL_BLOCK, "num_warps": 4},
    )


def _policy_scale(element: str) -> Configuration:
    return Configuration(
        name=f"policy scale {element}",
        kernel=policy_rows.scale_kernel,
        arguments={
            "gradient_ptr": f"*{element}",
            "factor_ptr": "*fp32",
            "stride_row": "i64",
            "vocab": "i32",
        },
        settings=lambda _: {"BLOCK": policy_rows.SCALE_BLOCK, "num_warps": 8},
        divisible=frozenset({"stride_row", "vocab"}),
    )
