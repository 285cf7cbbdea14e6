"""Every kernel in every configuration that ships, for `machine_code`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import triton.language as tl
from triton.backends.compiler import GPUTarget

from bench.machine_code import TARGETS, Configuration, Product, Stream
from rlef_kernels import _gae_triton as gae
from rlef_kernels import _linear_triton as linear
from rlef_kernels import _logprobs_triton as logprobs
from rlef_kernels import _segments_triton as segments
from rlef_kernels import _value_triton as value_loss
from rlef_kernels import _whitening_triton as whitening

SIZES = {"fp16": 2, "bf16": 2, "fp32": 4, "fp64": 8}
# Of the time that DRAM takes. Doubles are held to none: their arithmetic is not what GPUs are made for.
MOST_OF_DRAM = {"sm_90": 0.70, "sm_100": 1.0}


def configurations() -> list[Configuration]:
    return [
        *of_logprobs(),
        *of_linear(),
        *of_gae(),
        *of_segments(),
        *of_value_loss(),
        *of_whitening(),
    ]


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


def of_segments() -> list[Configuration]:
    """Segments begin anywhere, so that no access is wide; the mask is a byte per token."""
    found = [_segments("sum", element, loaded=SIZES[element] + 1) for element in ("bf16", "fp32")]
    found += [_segments("count", None, loaded=1), _segments("expand", "fp32", loaded=1, stored=4)]
    for from_end in (True, False):
        found.append(_segments("running sums", "fp32", loaded=4, stored=4, FROM_END=from_end))
    return found


def _segments(
    kernel: str, element: str | None, *, loaded: float, stored: float = 0, **constants: Any
) -> Configuration:
    pointer = None if element is None else f"*{element}"
    arguments: dict[str, str | None] = {"cu_seqlens_ptr": "*i32", "mask_ptr": "*u8", "tokens": "i32"}
    if kernel == "expand":
        function = segments.expand_kernel
        arguments |= {"expanded_ptr": pointer, "numbers_ptr": pointer}
    elif kernel == "running sums":
        function = segments.running_sums_kernel
        arguments |= {"sums_ptr": pointer, "values_ptr": pointer}
        constants["ACCUMULATE"] = tl.float32
    else:
        function = segments.sum_kernel
        arguments |= {"sums_ptr": "*i64" if element is None else "*fp32", "values_ptr": pointer}
    words = ["segment", kernel, *[element or ""], *["reversed"] * constants.get("FROM_END", False)]
    return Configuration(
        name=" ".join(word for word in words if word),
        kernel=function,
        arguments={name: kind for name, kind in arguments.items() if name in function.arg_names},
        constants=constants,
        settings=lambda _: {"BLOCK": segments.BLOCK, "num_warps": 4},
        stream=Stream(
            elements=lambda settings: settings["BLOCK"], loaded=loaded, stored=stored, is_wide=False
        ),
    )


def of_value_loss() -> list[Configuration]:
    """Each program takes one block, so that there is no loop to read."""
    return [_value_loss(element) for element in ("bf16", "fp32", "fp64")]


def _value_loss(element: str) -> Configuration:
    total = "*fp64" if element == "fp64" else "*fp32"
    return Configuration(
        name=f"value loss {element}",
        kernel=value_loss.value_loss_kernel,
        arguments={
            "sums_ptr": total,
            "gradient_ptr": total,
            "values_ptr": f"*{element}",
            "old_values_ptr": f"*{element}",
            "returns_ptr": total,
            "mask_ptr": "*u8",
            "normaliser_ptr": total,
            "num_values": "i32",
        },
        constants={"VALUE_CLIP": 0.2},
        settings=lambda _: {"BLOCK": value_loss.BLOCK, "num_warps": 4},
    )


def of_whitening() -> list[Configuration]:
    """Each program takes one block, so that there is no loop to read."""
    return [_whitening(kernel, element) for kernel in ("parts", "whiten") for element in ("bf16", "fp32")]


def _whitening(kernel: str, element: str) -> Configuration:
    arguments = {"values_ptr": f"*{element}", "mask_ptr": "*u8", "num_values": "i32"}
    if kernel == "parts":
        arguments |= {"parts_ptr": "*fp64"}
    else:
        arguments |= {"whitened_ptr": f"*{element}", "mean_ptr": "*fp64", "scale_ptr": "*fp64"}
    return Configuration(
        name=f"whitening {kernel} {element}",
        kernel=whitening.parts_kernel if kernel == "parts" else whitening.whiten_kernel,
        arguments=arguments,
        settings=lambda _: {"BLOCK": whitening.BLOCK, "num_warps": 4},
    )
