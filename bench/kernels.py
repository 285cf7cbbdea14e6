"""What compilers make of the Triton kernels, read from the machine code: no GPU and no driver is needed.

    python bench/kernels.py --aot [--targets sm_90 gfx942] [--kernels statistics] [--accept]

Each kernel is compiled as it is launched, in every configuration that ships, for each target. The table shows
registers, shared memory, spills, the bytes that a trip of the loop over the vocabulary moves per logit, how
many of its accesses are at least 128 bits wide, and an estimate from datasheets: the time of the busiest pipe
of a multiprocessor over the time that DRAM takes for the same bytes. The last line is JSON.

`--accept` writes the baseline, which `tests/kernels/test_aot.py` lets only improve.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Contraction of a * b + c is the default of this Triton, and will not be that of the next.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rlef_kernels import _logprobs_triton as logprobs

BASELINE = Path(__file__).with_name("kernels_aot.json")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Bytes of DRAM per clock and multiprocessor, from datasheets: A100 80 GB, H100 SXM, B200.
DRAM = {
    "sm_80": 2.039e12 / 108 / 1.410e9,
    "sm_90": 3.35e12 / 132 / 1.755e9,
    "sm_100": 8.0e12 / 148 / 1.85e9,
}
# Warp instructions per clock and multiprocessor, from the throughput table of the CUDA programming guide.
PIPES = {"issue": 4.0, "fma": 4.0, "alu": 2.0, "convert": 0.5, "special": 0.5, "memory": 1.0}
PIPE_OF = {
    "special": r"MUFU",
    "fma": r"F(FMA|MUL|ADD)2?$|IMAD|H(FMA|MUL|ADD)2",
    "memory": r"(LD|ST|ATOM|RED)",
    "convert": r"F2|I2F|FRND",
    "alu": r"FMNMX|FSETP|FSEL|SEL|LOP|ISETP|IADD|PRMT|SHF|LEA|PLOP|VIADD|IMNMX|VIMNMX|FSET",
}
SIZES = {"fp16": 2, "bf16": 2, "fp32": 4}
WIDE = 16  # bytes
MOST_OF_DRAM = 0.70  # on sm_90


@dataclass(frozen=True, slots=True, kw_only=True)
class Configuration:
    """A kernel as it is launched. Arguments that are None are compiled away."""

    name: str
    kernel: Any
    arguments: dict[str, str | None]  # Triton's name of each type
    constants: dict[str, Any]
    element: str  # type of the logits
    stores: int  # gradients written per logit
    divisible: bool  # the vocabulary and its strides, by 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What the machine code of a configuration says."""

    registers: int
    spills: int  # accesses of local memory
    shared: int  # bytes
    loaded: float  # bytes per logit, in the loop over the vocabulary
    stored: float
    wide: float  # part of the loop's accesses that are 128 bits or more
    pipe: str | None = None  # the busiest
    pipe_over_dram: float | None = None


@dataclass(frozen=True, slots=True)
class Instruction:
    opcode: str
    jumps_to: str | None


def configurations() -> list[Configuration]:
    """Every type, with and without entropy, on a whole vocabulary; rows, and odd vocabularies, once each."""
    found = [
        _configuration(kernel, element, entropy=entropy)
        for kernel in ("statistics", "gradient")
        for element in ("bf16", "fp16", "fp32")
        for entropy in (True, False)
    ]
    found += [_configuration(kernel, "bf16", rows=True) for kernel in ("statistics", "gradient")]
    return found + [_configuration(kernel, "bf16", divisible=False) for kernel in ("statistics", "gradient")]


def _configuration(
    kernel: str, element: str, *, entropy: bool = True, rows: bool = False, divisible: bool = True
) -> Configuration:
    of_tokens = "*i64" if rows else None
    lengths: dict[str, str | None] = {"stride_row": "i64", "vocab": "i32", "bits": "fp32"}
    if kernel == "statistics":
        arguments = {"statistics_ptr": "*fp32", "logits_ptr": f"*{element}", "columns_ptr": "*i64"}
        arguments |= {"rows_ptr": of_tokens, "num_tokens": "i32", "num_rows": "i32", **lengths}
    else:
        arguments = {"gradient_ptr": f"*{element}", "logits_ptr": f"*{element}", "columns_ptr": "*i64"}
        arguments |= {"tokens_ptr": of_tokens, "maximum_ptr": "*fp32", "for_every_ptr": "*fp32"}
        arguments |= {"for_shifted_ptr": "*fp32" if entropy else None, "for_target_ptr": "*fp32", **lengths}
    words = [kernel, element, *["entropy"] * entropy, *["rows"] * rows, *["odd"] * (not divisible)]
    return Configuration(
        name=" ".join(words),
        kernel=logprobs.statistics_kernel if kernel == "statistics" else logprobs.gradient_kernel,
        arguments=arguments,
        constants={"WANT_ENTROPY": entropy} if kernel == "statistics" else {},
        element=element,
        stores=int(kernel == "gradient"),
        divisible=divisible,
    )


def compiled(configuration: Configuration, target: str) -> tuple[Any, dict[str, int]]:
    """The kernel as Triton compiles it at a launch, and that launch's settings."""
    device = TARGETS[target]
    settings = logprobs.launch_settings(SIZES[configuration.element], device.warp_size)
    constants = {**configuration.constants, "LOADS": settings["LOADS"], "LANES": settings["LANES"]}
    constants |= {name: None for name, kind in configuration.arguments.items() if kind is None}
    names = configuration.kernel.arg_names
    signature = {name: "constexpr" if name in constants else configuration.arguments[name] for name in names}
    # Allocations are aligned; lengths count as divisible by 16 where they are so.
    aligned = {name for name, kind in signature.items() if kind is not None and kind.startswith("*")}
    if configuration.divisible:
        aligned |= {"stride_row", "vocab"}
    source = ASTSource(
        fn=configuration.kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    return triton.compile(source, target=device, options={"num_warps": settings["num_warps"]}), settings


def report(configuration: Configuration, target: str) -> Report:
    binary, settings = compiled(configuration, target)
    threads = settings["num_warps"] * TARGETS[target].warp_size
    read = _read_hip if target.startswith("gfx") else _read_cuda
    instructions, labels, registers, spills, width = read(binary)
    loop = _busiest_loop(instructions, labels, width)
    accesses = [width(each.opcode) for each in loop if width(each.opcode)]
    elements = settings["LOADS"] * settings["LANES"]
    loaded = sum(number for number, is_store in accesses if not is_store) * threads
    stored = sum(number for number, is_store in accesses if is_store) * threads
    pipe = over_dram = None
    if target in DRAM:
        clocks = _clocks(loop, settings["num_warps"])
        pipe = max(clocks, key=lambda name: clocks[name])
        over_dram = round(clocks[pipe] * DRAM[target] / (loaded + stored), 2)
    return Report(
        registers=registers,
        spills=spills,
        shared=int(binary.metadata.shared),
        loaded=round(loaded / elements, 3),
        stored=round(stored / elements, 3),
        wide=round(sum(number >= WIDE for number, _ in accesses) / len(accesses), 3),
        pipe=pipe,
        pipe_over_dram=over_dram,
    )


def _busiest_loop(
    instructions: Sequence[Instruction], labels: dict[str, int], width: Any
) -> list[Instruction]:
    """The innermost loop that moves the most bytes: the one over the vocabulary."""
    loops = [
        list(instructions[labels[each.jumps_to] : end + 1])
        for end, each in enumerate(instructions)
        if each.jumps_to in labels and labels[each.jumps_to] < end
    ]
    return max(loops, key=lambda loop: sum(width(each.opcode)[0] for each in loop if width(each.opcode)))


def _clocks(loop: Sequence[Instruction], num_warps: int) -> Counter[str]:
    """Of one trip of a block, if each pipe had nothing to wait for."""
    clocks: Counter[str] = Counter()
    for each in loop:
        clocks["issue"] += num_warps / PIPES["issue"]
        opcode = each.opcode.split(".")[0]
        for pipe, pattern in PIPE_OF.items():
            if re.match(pattern, opcode):
                words = (_width_cuda(each.opcode) or (4,))[0] / 4  # a wide access is as many narrow ones
                clocks[pipe] += num_warps / PIPES[pipe] * max(1, words)
                break
    return clocks


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


def _read_cuda(binary: Any) -> tuple[list[Instruction], dict[str, int], int, int, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        text = _tool("nvdisasm", "-c", file.name)
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
    instructions, labels = _parse(
        text, r"\s*(\.L_x_\d+):", r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][A-Z0-9_.]*)(.*)"
    )
    (registers,) = re.findall(r"REG:(\d+)", usage)
    return instructions, labels, int(registers), _count(instructions, r"LDL|STL"), _width_cuda


def _read_hip(binary: Any) -> tuple[list[Instruction], dict[str, int], int, int, Any]:
    text = binary.asm["amdgcn"]
    instructions, labels = _parse(text, r"(\.LBB\d+_\d+):", r"\t([a-z]+_[a-z0-9_]+)\b(.*)")
    (registers,) = re.findall(r"\.vgpr_count:\s+(\d+)", text)
    spills = sum(int(number) for number in re.findall(r"\.[sv]gpr_spill_count:\s+(\d+)", text))
    return instructions, labels, int(registers), spills + _count(instructions, "scratch_"), _width_hip


def _parse(text: str, label: str, instruction: str) -> tuple[list[Instruction], dict[str, int]]:
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if found := re.match(label, line):
            labels[found[1]] = len(instructions)
        elif found := re.match(instruction, line):
            target = re.search(r"(\.L_x_\d+|\.LBB\d+_\d+)", found[2])
            instructions.append(Instruction(found[1], target[1] if target else None))
    return instructions, labels


def _count(instructions: Sequence[Instruction], pattern: str) -> int:
    return sum(bool(re.match(pattern, each.opcode)) for each in instructions)


def _width_cuda(opcode: str) -> tuple[int, bool] | None:
    """Bytes that a thread moves from or to global memory, and whether it stores; None if neither."""
    if not (found := re.match(r"(LDG|STG)\b", opcode)):
        return None
    bits = re.search(r"\.(256|128|64|[US]16|[US]8)\b", opcode)
    return (int(bits[1].lstrip("US")) // 8 if bits else 4), found[1] == "STG"


def _width_hip(opcode: str) -> tuple[int, bool] | None:
    if not (found := re.match(r"(?:global|buffer)_(load|store)_(.*)", opcode)):
        return None
    if words := re.match(r"dword(?:x(\d))?", found[2]):
        return 4 * int(words[1] or 1), found[1] == "store"
    return (1 if "byte" in found[2] else 2), found[1] == "store"


def faults(configuration: Configuration, found: Report, target: str) -> Iterator[str]:
    """What no kernel may do, whatever the baseline says."""
    size = SIZES[configuration.element]
    if found.spills:
        yield f"{found.spills} spills; there must be none"
    if found.loaded > 1.01 * size:
        yield f"loads {found.loaded} bytes per logit of {size} bytes"
    if found.stored > 1.01 * size * configuration.stores:
        yield f"stores {found.stored} bytes per logit; {size * configuration.stores} are its gradient"
    if configuration.divisible and found.wide < 1:
        yield f"only {found.wide:.0%} of the accesses are 128 bits wide"
    if target == "sm_90" and configuration.divisible and (found.pipe_over_dram or 0) > MOST_OF_DRAM:
        yield f"the {found.pipe} pipe takes {found.pipe_over_dram} of DRAM's time, above {MOST_OF_DRAM}"


def worse(found: Report, accepted: Report) -> Iterator[str]:
    """What a baseline held better."""
    for field in ("registers", "spills", "shared", "loaded", "stored", "pipe_over_dram"):
        new, old = getattr(found, field), getattr(accepted, field)
        if new is not None and old is not None and new > old:
            yield f"{field}: {new}, was {old}"
    if found.wide < accepted.wide:
        yield f"wide: {found.wide}, was {accepted.wide}"


def read_baseline() -> dict[str, Report]:
    held = json.loads(BASELINE.read_text(encoding="utf-8"))
    return {name: Report(**values) for name, values in held["reports"].items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--aot", action="store_true", required=True, help="compile and read the machine code")
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=TARGETS)
    parser.add_argument("--kernels", default="", help="those whose name begins so")
    parser.add_argument("--accept", action="store_true", help=f"write {BASELINE.name}")
    arguments = parser.parse_args()

    reports: dict[str, Report] = {}
    failed = False
    print(f"{'kernel':28} target  regs spills shared   load  store wide  pipe")
    for configuration in configurations():
        if not configuration.name.startswith(arguments.kernels):
            continue
        for target in arguments.targets:
            found = report(configuration, target)
            reports[f"{configuration.name} {target}"] = found
            pipe = f"{found.pipe} {found.pipe_over_dram}" if found.pipe else ""
            print(
                f"{configuration.name:28} {target:7} {found.registers:4} {found.spills:6} {found.shared:6}"
                f" {found.loaded:6.2f} {found.stored:6.2f} {found.wide:4.0%}  {pipe}"
            )
            for fault in faults(configuration, found, target):
                failed = True
                print(f"  FAULT: {fault}")
    result = {"triton": triton.__version__, "reports": {name: asdict(each) for name, each in reports.items()}}
    if arguments.accept:
        BASELINE.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))
    sys.exit(failed)


if __name__ == "__main__":
    main()
