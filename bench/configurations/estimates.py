"""The kernels of advantages, segments, the value loss and whitening."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton.language as tl
from triton.backends.compiler import GPUTarget

from bench.configurations.common import SIZES
from bench.machine_code import Configuration, Stream
from rlef_kernels import _gae_triton as gae
from rlef_kernels import _segments_triton as segments
from rlef_kernels import _value_triton as value_loss
from rlef_kernels import _whitening_triton as whitening


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
