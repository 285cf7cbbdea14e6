"""What compilers make of a Triton kernel, read from the machine code: no GPU and no driver is needed.

A `Configuration` is a kernel as it is launched; `report` compiles it for a target and reads registers, shared
memory, spills and, for a kernel that streams through memory, the bytes that its loop moves per element, how
many of its accesses are at least 128 bits wide, and an estimate from datasheets: the time of the busiest pipe
of a multiprocessor over the time that DRAM takes for the same bytes. Of a matrix product it reads what its
loop is made of, and what comes after the loop beside the matrix instructions. `faults` says what no kernel
may do.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Contraction of a * b + c is the default of this Triton, and will not be that of the next.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

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
# Floating-point operations of the tensor cores in half precision per clock and multiprocessor, likewise.
MATRIX = {
    "sm_80": 312e12 / 108 / 1.410e9,
    "sm_90": 989e12 / 132 / 1.755e9,
    "sm_100": 2250e12 / 148 / 1.85e9,
}
# What a loop of a matrix product is made of: instructions of tensor cores, and copies that nobody waits for.
PRODUCTS = {"sm_80": r"HMMA", "sm_90": r"HGMMA", "sm_100": r"UTC[A-Z]*MMA", "gfx942": r"v_mfma"}
BULK_COPIES = {"sm_90": r"UTMALDG", "sm_100": r"UTMALDG"}
COPIES = {"sm_80": r"LDGSTS", "sm_90": r"LDGSTS", "sm_100": r"LDGSTS"}
# Warp instructions per clock and multiprocessor, from the throughput table of the CUDA programming guide.
PIPES = {"issue": 4.0, "fma": 4.0, "alu": 2.0, "convert": 0.5, "special": 0.5, "memory": 1.0}
PIPE_OF = {
    "special": r"MUFU",
    "fma": r"F(FMA|MUL|ADD)2?$|IMAD|H(FMA|MUL|ADD)2",
    "memory": r"(LD|ST|ATOM|RED)",
    "convert": r"F2|I2F|FRND",
    "alu": r"FMNMX|FSETP|FSEL|SEL|LOP|ISETP|IADD|PRMT|SHF|LEA|PLOP|VIADD|IMNMX|VIMNMX|FSET",
}
WIDE = 16  # bytes
TOLERANCE = 1.01  # of bytes per element: the rest of a row, and what is read once for each
# Accesses of global memory.
Width = Callable[[str], tuple[int, bool] | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """What the loops of a kernel that streams through memory may cost."""

    elements: Callable[[Mapping[str, int]], int]  # of one trip of a program, by the settings of its launch
    loaded: float  # bytes per element, at most
    stored: float
    loops: int = 1  # how many loops go over all elements
    is_wide: bool = True  # every access is to be 128 bits or more
    narrow: int = 0  # but for so many of a trip, of a number that many elements share
    pipe_over_dram: Mapping[str, float] = field(default_factory=dict)  # at most, by target


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """What a matrix product has to be made of, and what may come after its loop."""

    operations: Callable[[Mapping[str, int]], float]  # of a program's tile, as deep as it is judged by
    uses_bulk_copies: bool = False
    needs_copies: bool = True
    after_loop: Mapping[str, float] = field(
        default_factory=dict
    )  # over the matrix clocks, at most, by target


@dataclass(frozen=True, slots=True, kw_only=True)
class Configuration:
    """A kernel as it is launched. Arguments that are None are compiled away."""

    name: str
    kernel: Any
    arguments: Mapping[str, str | None]  # Triton's name of each type
    settings: Callable[[GPUTarget], Mapping[str, int]]  # num_warps, num_stages, and constants of the launch
    constants: Mapping[str, Any] = field(default_factory=dict)
    divisible: frozenset[str] = frozenset()  # numbers that 16 divides, as a launch would find
    stream: Stream | None = None
    product: Product | None = None
    targets: tuple[str, ...] = tuple(TARGETS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What the machine code of a configuration says."""

    registers: int
    spills: int  # accesses of local memory
    shared: int  # bytes
    loaded: float | None = None  # bytes per element, in the loops of the stream
    stored: float | None = None
    wide: float | None = None  # part of the loops' accesses that are 128 bits or more
    pipe: str | None = None  # the busiest, of a product after its loop
    pipe_over_dram: float | None = None
    products: int | None = None  # matrix instructions in the loop of a product
    copies: int | None = None  # copies to shared memory there that no thread waits for
    after_loop: float | None = None  # of the busiest pipe after the loop, over the matrix clocks


@dataclass(frozen=True, slots=True)
class Instruction:
    opcode: str
    jumps_to: str | None
    is_conditional: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Code:
    """Machine code, disassembled."""

    instructions: list[Instruction]
    labels: dict[str, int]
    registers: int
    spills: int
    width: Width


def compiled(configuration: Configuration, target: str) -> tuple[Any, Mapping[str, int]]:
    """The kernel as Triton compiles it at a launch, and that launch's settings."""
    device = TARGETS[target]
    settings = configuration.settings(device)
    options = {name: settings[name] for name in ("num_warps", "num_stages") if name in settings}
    constants = {**configuration.constants}
    constants |= {name: value for name, value in settings.items() if name not in options}
    constants |= {name: None for name, kind in configuration.arguments.items() if kind is None}
    names = configuration.kernel.arg_names
    signature = {name: "constexpr" if name in constants else configuration.arguments[name] for name in names}
    # Allocations are aligned.
    aligned = {name for name, kind in signature.items() if kind is not None and kind.startswith("*")}
    source = ASTSource(
        fn=configuration.kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={
            (names.index(name),): [["tt.divisibility", 16]]
            for name in aligned | (configuration.divisible - set(constants))
        },
    )
    return triton.compile(source, target=device, options=options), settings


def report(configuration: Configuration, target: str) -> Report:
    binary, settings = compiled(configuration, target)
    code = (_read_hip if target.startswith("gfx") else _read_cuda)(binary)
    found = {}
    if configuration.stream is not None:
        found = _of_stream(code, configuration.stream, settings, target)
    if configuration.product is not None:
        found = _of_product(code, configuration.product, settings, target)
    return Report(registers=code.registers, spills=code.spills, shared=int(binary.metadata.shared), **found)


def _of_stream(code: Code, stream: Stream, settings: Mapping[str, int], target: str) -> dict[str, Any]:
    threads = settings["num_warps"] * TARGETS[target].warp_size
    loop = _busiest_loops(code, stream.loops)
    accesses = [width for each in loop if (width := code.width(each.opcode))]
    loaded = sum(number for number, is_store in accesses if not is_store) * threads
    stored = sum(number for number, is_store in accesses if is_store) * threads
    elements = stream.elements(settings)
    found: dict[str, Any] = {
        "loaded": round(loaded / elements, 3),
        "stored": round(stored / elements, 3),
        "wide": round(sum(number >= WIDE for number, _ in accesses) / (len(accesses) - stream.narrow), 3),
    }
    if target in DRAM:
        clocks = _clocks(loop, settings["num_warps"])
        pipe = max(clocks, key=lambda name: clocks[name])
        found["pipe"] = pipe
        found["pipe_over_dram"] = round(clocks[pipe] * DRAM[target] / (loaded + stored), 2)
    return found


def _of_product(code: Code, product: Product, settings: Mapping[str, int], target: str) -> dict[str, Any]:
    begin, end = _innermost_loop_with(code, PRODUCTS[target])
    loop = code.instructions[begin : end + 1]
    copies = (BULK_COPIES if product.uses_bulk_copies else COPIES).get(target)
    found: dict[str, Any] = {
        "products": _count(loop, PRODUCTS[target]),
        "copies": None if copies is None else _count(loop, copies),
    }
    if target in MATRIX:
        clocks = _clocks(_shortest_way_out(code, end + 1), settings["num_warps"])
        pipe = max(clocks, key=lambda name: clocks[name])
        found["pipe"] = pipe
        found["after_loop"] = round(clocks[pipe] * MATRIX[target] / product.operations(settings), 4)
    return found


def _spans(code: Code) -> list[tuple[int, int]]:
    """First and last instruction of each loop."""
    return [
        (code.labels[each.jumps_to], end)
        for end, each in enumerate(code.instructions)
        if each.jumps_to in code.labels and code.labels[each.jumps_to] < end
    ]


def _innermost_loop_with(code: Code, pattern: str) -> tuple[int, int]:
    return min(
        (span for span in _spans(code) if _count(code.instructions[span[0] : span[1] + 1], pattern)),
        key=lambda span: span[1] - span[0],
    )


def _shortest_way_out(code: Code, begin: int) -> list[Instruction]:
    """The instructions from there to the end for a program that nothing extraordinary happens to: no barrier
    that is not there yet, no vocabulary that ends in its tile."""
    came_from: dict[int, int | None] = {begin: None}
    nearest = deque([begin])
    while nearest:
        place = nearest.popleft()
        each = code.instructions[place]
        if each.opcode == "EXIT" and not each.is_conditional:
            way = [each]
            while (before := came_from[place]) is not None:
                place = before
                way.append(code.instructions[place])
            return way[::-1]
        jumps = each.opcode.startswith("BRA") and each.jumps_to in code.labels
        following = [code.labels[str(each.jumps_to)]] if jumps else []
        if not jumps or each.is_conditional:
            following.append(place + 1)
        for each_place in following:
            if each_place not in came_from:
                came_from[each_place] = place
                nearest.append(each_place)
    raise AssertionError("the machine code has no end")


def _busiest_loops(code: Code, number: int) -> list[Instruction]:
    """The instructions of the innermost loops that load (or else store) the most: those over all elements.

    Which loads, as a compiler may unroll one that only stores.
    """

    def moved(loop: Sequence[Instruction]) -> list[int]:
        widths = [width for each in loop if (width := code.width(each.opcode))]
        return [sum(number for number, is_store in widths if is_store == kind) for kind in (False, True)]

    spans = _spans(code)
    innermost = [
        (begin, end)
        for begin, end in spans
        if not any((begin, end) != other and begin <= other[0] and other[1] <= end for other in spans)
    ]
    loops = [code.instructions[begin : end + 1] for begin, end in innermost]
    loops.sort(key=moved, reverse=True)
    return [each for loop in loops[:number] for each in loop]


def _clocks(loop: Sequence[Instruction], num_warps: int) -> Counter[str]:
    """Of one trip of a block, if each pipe had nothing to wait for."""
    clocks: Counter[str] = Counter()
    for each in loop:
        clocks["issue"] += num_warps / PIPES["issue"]
        opcode = each.opcode.split(".")[0]
        for pipe, pattern in PIPE_OF.items():
            if re.match(pattern, opcode):
                words = _bytes_in(each.opcode) / 4 if pipe == "memory" else 1  # wide: as many narrow ones
                clocks[pipe] += num_warps / PIPES[pipe] * max(1, words)
                break
    return clocks


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


def _read_cuda(binary: Any) -> Code:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        text = _tool("nvdisasm", "-c", file.name)
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
    instructions, labels = _parse(
        text, r"\s*(\.L_x_\d+):", r"\s+/\*[0-9a-f]+\*/\s+(@!?U?P\w+ )?\s*([A-Z][A-Z0-9_.]*)(.*)"
    )
    (registers,) = re.findall(r"REG:(\d+)", usage)
    return Code(
        instructions=instructions,
        labels=labels,
        registers=int(registers),
        spills=_count(instructions, r"LDL|STL"),
        width=_width_cuda,
    )


def _read_hip(binary: Any) -> Code:
    text = binary.asm["amdgcn"]
    instructions, labels = _parse(text, r"(\.LBB\d+_\d+):", r"\t()([a-z]+_[a-z0-9_]+)\b(.*)")
    (registers,) = re.findall(r"\.vgpr_count:\s+(\d+)", text)
    spills = sum(int(number) for number in re.findall(r"\.[sv]gpr_spill_count:\s+(\d+)", text))
    return Code(
        instructions=instructions,
        labels=labels,
        registers=int(registers),
        spills=spills + _count(instructions, "scratch_"),
        width=_width_hip,
    )


def _parse(text: str, label: str, instruction: str) -> tuple[list[Instruction], dict[str, int]]:
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if found := re.match(label, line):
            labels[found[1]] = len(instructions)
        elif found := re.match(instruction, line):
            target = re.search(r"(\.L_x_\d+|\.LBB\d+_\d+)", found[3])
            is_conditional = bool(found[1] or re.match(r"\s+!?U?P\d", found[3]) or "_cbranch_" in found[2])
            instructions.append(Instruction(found[2], target[1] if target else None, is_conditional))
    return instructions, labels


def _count(instructions: Sequence[Instruction], pattern: str) -> int:
    return sum(bool(re.match(pattern, each.opcode)) for each in instructions)


def _width_cuda(opcode: str) -> tuple[int, bool] | None:
    """Bytes that a thread moves from or to global memory, and whether it stores; None if neither."""
    if not (found := re.match(r"(LDG|STG)\b", opcode)):
        return None
    return _bytes_in(opcode), found[1] == "STG"


def _bytes_in(opcode: str) -> int:
    """That a thread moves."""
    if matrices := re.search(r"M88(?:\.(\d))?", opcode):
        return 4 * int(matrices[1] or 1)
    bits = re.search(r"\.(256|128|64|[US]16|[US]8)\b", opcode)
    return int(bits[1].lstrip("US")) // 8 if bits else 4


def _width_hip(opcode: str) -> tuple[int, bool] | None:
    if not (found := re.match(r"(?:global|buffer)_(load|store)_(.*)", opcode)):
        return None
    if words := re.match(r"dword(?:x(\d))?", found[2]):
        return 4 * int(words[1] or 1), found[1] == "store"
    return (1 if "byte" in found[2] else 2), found[1] == "store"


def faults(configuration: Configuration, found: Report, target: str) -> Iterator[str]:
    """What no kernel may do, whatever the baseline says."""
    if found.spills:
        yield f"{found.spills} spills; there must be none"
    if configuration.product is not None:
        yield from _faults_of_product(configuration.product, found, target)
    if (stream := configuration.stream) is None:
        return
    for verb, bytes_moved, most in (
        ("loads", found.loaded, stream.loaded),
        ("stores", found.stored, stream.stored),
    ):
        if bytes_moved is None or bytes_moved > TOLERANCE * most:
            yield f"{verb} {bytes_moved} bytes per element; {most} are enough"
    if stream.is_wide and (found.wide is None or found.wide < 1):
        yield f"only {found.wide or 0:.0%} of the accesses are 128 bits wide"
    most = stream.pipe_over_dram.get(target)
    if most is not None and (found.pipe_over_dram is None or found.pipe_over_dram > most):
        yield f"the {found.pipe} pipe takes {found.pipe_over_dram} of DRAM's time, above {most}"


def _faults_of_product(product: Product, found: Report, target: str) -> Iterator[str]:
    if not found.products:
        yield "no matrix instruction in the loop"
    if product.needs_copies and found.copies == 0:
        yield f"no {'bulk ' if product.uses_bulk_copies else ''}copy to shared memory in the loop"
    most = product.after_loop.get(target)
    if most is not None and (found.after_loop is None or found.after_loop > most):
        yield f"after the loop the {found.pipe} pipe takes {found.after_loop} of its clocks, above {most}"


def worse(found: Report, accepted: Report) -> Iterator[str]:
    """What a baseline held better."""
    for name in ("registers", "spills", "shared", "loaded", "stored", "pipe_over_dram", "after_loop"):
        new, old = getattr(found, name), getattr(accepted, name)
        if new is not None and old is not None and new > old:
            yield f"{name}: {new}, was {old}"
    for name in ("wide", "products", "copies"):
        new, old = getattr(found, name), getattr(accepted, name)
        if new is not None and old is not None and new < old:
            yield f"{name}: {new}, was {old}"
