"""The kernels of the log-probabilities."""

from __future__ import annotations

from bench.configurations.common import MOST_OF_DRAM, SIZES
from bench.machine_code import Configuration, Stream
from rlef_kernels import _logprobs_triton as logprobs


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
