"""The kernels of the linear policy loss."""

from __future__ import annotations

from dataclasses import asdict

from triton.backends.compiler import GPUTarget

from bench.configurations.common import MOST_OF_DRAM, SIZES
from bench.machine_code import TARGETS, Configuration, Product, Stream
from rlef_kernels import _linear_triton as linear

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
