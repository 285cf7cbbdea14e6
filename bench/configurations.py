"""Every kernel in every configuration that ships, for `machine_code`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from triton.backends.compiler import GPUTarget

from bench.machine_code import TARGETS, Configuration, Product, Stream
from rlef_kernels import _gae_triton as gae
from rlef_kernels import _linear_triton as linear
from rlef_kernels import _logprobs_triton as logprobs
from rlef_kernels import _policy_rows_triton as policy_rows
from rlef_kernels import _policy_shards_triton as policy_shards
from rlef_kernels import _policy_triton as policy

SIZES = {"fp16": 2, "bf16": 2, "fp32": 4, "fp64": 8}
# Of the time that DRAM takes. Doubles are held to none: their arithmetic is not what GPUs are made for.
MOST_OF_DRAM = {"sm_90": 0.70, "sm_100": 1.0}


def configurations() -> list[Configuration]:
    return [*of_logprobs(), *of_policy(), *of_linear(), *of_gae()]


def of_logprobs() -> list[Configuration]:
    """Every type, with and without entropy, on a whole vocabulary; rows, and odd vocabularies, once each."""
    found = [
        _logprobs(kernel, element, entropy=entropy)
        for kernel in ("statistics", "gradient")
        for element in ("bf16", "fp16", "fp32")
        for entropy in (True, False)
    ]
    for kernel in ("statistics", "gradient"):
        found.append(_logprobs(kernel, "bf16", rows=True))
        found.append(_logprobs(kernel, "bf16", divisible=False))
        found.append(_logprobs(kernel, "fp64"))
    return found


def _logprobs(
    kernel: str, element: str, *, entropy: bool = True, rows: bool = False, divisible: bool = True
) -> Configuration:
    size = SIZES[element]
    loads = logprobs.LOADS_OF_STATISTICS if kernel == "statistics" else logprobs.LOADS_OF_GRADIENT
    of_tokens = "*i64" if rows else None
    lengths: dict[str, str | None] = {"stride_row": "i64", "vocab": "i32", "bits": "fp64"}
    sums = "*fp64" if element == "fp64" else "*fp32"
    if kernel == "statistics":
        arguments = {"statistics_ptr": sums, "logits_ptr": f"*{element}", "columns_ptr": "*i64"}
        arguments |= {"rows_ptr": of_tokens, "num_tokens": "i32", "num_rows": "i32", **lengths}
    else:
        arguments = {"gradient_ptr": f"*{element}", "logits_ptr": f"*{element}", "columns_ptr": "*i64"}
        arguments |= {"tokens_ptr": of_tokens, "maximum_ptr": sums, "for_every_ptr": sums}
        arguments |= {"for_shifted_ptr": sums if entropy else None, "for_target_ptr": sums, **lengths}
    words = [kernel, element, *["entropy"] * entropy, *["rows"] * rows, *["odd"] * (not divisible)]
    return Configuration(
        name=" ".join(words),
        kernel=logprobs.statistics_kernel if kernel == "statistics" else logprobs.gradient_kernel,
        arguments=arguments,
        constants={
            "ALIGNED": divisible,
            **({"WANT_ENTROPY": entropy} if kernel == "statistics" else {"TOGETHER": True}),
        },
        settings=lambda device: logprobs.launch_settings(size, loads, device.warp_size),
        divisible=frozenset({"stride_row", "vocab"} if divisible else ()),
        stream=Stream(
            elements=lambda settings: settings["LOADS"] * settings["THREADS"] * settings["WORDS"],
            loaded=size,
            stored=size if kernel == "gradient" else 0,
            pipe_over_dram={} if element == "fp64" else MOST_OF_DRAM,
        ),
    )


# Of a product as deep as a common hidden size, after its loop and by the matrix clocks.
DEPTH, MOST_AFTER_LOOP = 4096, {"sm_90": 0.06, "sm_100": 0.06}
DESCRIPTOR_TARGETS, POINTER_TARGETS = ("sm_90", "sm_100"), ("sm_80", "gfx942")


def of_linear() -> list[Configuration]:
    """Both half precisions, with and without entropy, on every target; once each a product that keeps no
    exponentials, and one whose sizes 16 does not divide."""
    variants = [(element, entropy) for element in ("bf16", "fp16") for entropy in (True, False)]
    return [
        *(_tiles(element, entropy=entropy, by_descriptor=True) for element, entropy in variants),
        *(_tiles(element, entropy=entropy, by_descriptor=False) for element, entropy in variants),
        _tiles("bf16", entropy=True, by_descriptor=True, keeps=False),
        _tiles("bf16", entropy=True, by_descriptor=False, divisible=False),
        *(_linear_gradient(element, entropy=entropy) for element, entropy in variants),
    ]


def _tiles(
    element: str, *, entropy: bool, by_descriptor: bool, keeps: bool = True, divisible: bool = True
) -> Configuration:
    tiles = linear.HOPPER if by_descriptor else linear.OTHERS  # blocks are the same on sm_100
    blocks = (tiles.ROWS, tiles.DEPTH), (tiles.COLUMNS, tiles.DEPTH), (tiles.ROWS, tiles.COLUMNS)
    operands = [
        f"tensordesc<{element}[{rows},{columns}]>" if by_descriptor else f"*{element}"
        for rows, columns in blocks
    ]
    words = ["linear", element, *["entropy"] * entropy, *["descriptors"] * by_descriptor]
    targets = DESCRIPTOR_TARGETS if by_descriptor else POINTER_TARGETS
    return Configuration(
        name=" ".join([*words, *["values"] * (not keeps), *["odd"] * (not divisible)]),
        kernel=linear.tile_kernel,
        arguments={
            "hidden": operands[0],
            "weight": operands[1],
            "exponentials": operands[2] if keeps else None,
            "statistics_ptr": "*fp32",
            "columns_ptr": "*i32",
            "stride_hidden": "i64",
            "stride_weight": "i64",
            "num_tokens": "i32",
            "vocab": "i32",
            "hidden_size": "i32",
            "bits": "fp32",
        },
        constants={
            "WANT_ENTROPY": entropy,
            "HEADROOM": 15.0 if element == "fp16" else 0.0,
            "SEGMENT": linear.SEGMENT,
            "GROUP": linear.GROUP,
        },
        settings=lambda device: asdict(_tiles_of(device) if divisible else linear.OTHERS),
        divisible=frozenset({"stride_hidden", "stride_weight", "vocab", "hidden_size"} if divisible else ()),
        product=Product(
            operations=lambda settings: 2 * settings["ROWS"] * settings["COLUMNS"] * DEPTH,
            uses_bulk_copies=by_descriptor,
            needs_copies=divisible,
            after_loop=MOST_AFTER_LOOP if divisible else {},
        ),
        targets=targets if divisible else tuple(TARGETS),
    )


def _tiles_of(device: GPUTarget) -> linear.Tiles:
    return {90: linear.HOPPER, 100: linear.BLACKWELL}.get(device.arch, linear.OTHERS)


def _linear_gradient(element: str, *, entropy: bool) -> Configuration:
    size, arrays = SIZES[element], 1 + entropy
    # Sixteen threads have the same segment, and each asks for what belongs to it.
    of_thread = linear.SEGMENTS * linear.SEGMENT // linear.THREADS
    narrow = arrays * of_thread * size // 16
    return Configuration(
        name=" ".join(["linear gradient", element, *["entropy"] * entropy]),
        kernel=linear.gradient_kernel,
        arguments={
            "exponentials_ptr": f"*{element}",
            "factors_ptr": "*fp32",
            "slopes_ptr": "*fp32" if entropy else None,
            "for_target_ptr": "*fp32",
            "columns_ptr": "*i32",
            "stride_row": "i64",
            "num_segments": "i32",
        },
        constants={"SEGMENT": linear.SEGMENT, "SEGMENTS": linear.SEGMENTS},
        settings=lambda device: {"num_warps": linear.THREADS // device.warp_size},
        divisible=frozenset({"stride_row"}),
        stream=Stream(
            elements=lambda _: linear.SEGMENTS * linear.SEGMENT,
            loaded=size + 4 * narrow / of_thread,
            stored=size,
            narrow=narrow,
            pipe_over_dram=MOST_OF_DRAM,
        ),
    )


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


def of_gae() -> list[Configuration]:
    """One program for each sequence, so that what counts is that several fit on a multiprocessor."""
    return [_gae(value) for value in ("bf16", "fp32", "fp64")]


def _gae(value: str) -> Configuration:
    total = "*fp64" if value == "fp64" else "*fp32"
    return Configuration(
        name=f"gae {value}",
        kernel=gae._gae_kernel,  # noqa: SLF001
        arguments={
            "values_ptr": f"*{value}",
            "rewards_ptr": "*fp32",
            "action_mask_ptr": "*u8",
            "cu_seqlens_ptr": "*i32",
            "advantages_ptr": total,
            "returns_ptr": total,
            "tokens": "i32",
        },
        constants={"GAMMA": 0.99, "LAMBDA": 0.95},
        settings=_settings_of_gae,
    )


def _settings_of_gae(_: GPUTarget) -> Mapping[str, Any]:
    return {"BLOCK": gae.BLOCK, "num_warps": 4}
