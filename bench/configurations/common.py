"""What several families of kernels share."""

from __future__ import annotations

SIZES = {"fp16": 2, "bf16": 2, "fp32": 4, "fp64": 8}  # bytes
# Of the time that DRAM takes. Doubles are held to none: their arithmetic is not what GPUs are made for.
MOST_OF_DRAM = {"sm_90": 0.70, "sm_100": 1.0}
