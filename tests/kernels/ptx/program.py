"""The text of a kernel in PTX, taken apart: instructions, operands, labels, parameters."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from tests.kernels.ptx.faults import Unsupported

SHARED = "global_smem"  # Triton's name of a program's shared memory
_SPECIAL = re.compile(r"%(tid|ntid|ctaid|nctaid)\.[xyz]|%laneid")
_IGNORED = (".loc", ".file", ".pragma")


@dataclass(frozen=True, slots=True)
class Register:
    name: str  # or "_", which takes what nobody wants


@dataclass(frozen=True, slots=True)
class Special:
    name: str


@dataclass(frozen=True, slots=True)
class Immediate:
    bits: int  # two's complement of any width


@dataclass(frozen=True, slots=True)
class Symbol:
    name: str


@dataclass(frozen=True, slots=True)
class Address:
    base: Register | Symbol | None
    offset: int


@dataclass(frozen=True, slots=True)
class Vector:
    elements: tuple[Operand, ...]


@dataclass(frozen=True, slots=True)
class Pair:
    first: Operand
    second: Operand


Operand = Register | Special | Immediate | Symbol | Address | Vector | Pair


@dataclass(frozen=True, slots=True)
class Instruction:
    text: str
    line: int  # of the program, from 1
    guard: str | None  # the predicate without which nothing happens
    negated: bool
    opcode: tuple[str, ...]  # its parts, between the dots
    operands: tuple[Operand, ...]

    @property
    def kind(self) -> str:
        """The last type that the opcode names."""
        return self.opcode[-1]

    @property
    def uses_shared_memory(self) -> bool:
        """It reads it, writes it, or says when others may."""
        return self.opcode[0] == "bar" or "shared" in self.opcode or "wait_group" in self.opcode

    @property
    def is_copy(self) -> bool:
        return self.opcode[:2] == ("cp", "async") and "shared" in self.opcode

    def only(self, *modifiers: str) -> None:
        """Refuse a modifier whose meaning nobody has looked up."""
        unknown = set(self.opcode[1:]) - set(modifiers)
        if unknown:
            raise Unsupported(f"{self.opcode[0]} does not know {', '.join(sorted(unknown))}")


@dataclass(frozen=True, slots=True)
class Parameter:
    name: str
    kind: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    name: str
    threads: int  # of a block
    shared_bytes: int
    parameters: tuple[Parameter, ...]
    widths: dict[str, int]  # bits of registers, by their names or what these begin with; 1 is a predicate
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]

    def places(self, *opcode: str) -> list[int]:
        """Of the instructions that begin so."""
        return [place for place, each in enumerate(self.instructions) if each.opcode[: len(opcode)] == opcode]

    def without(self, place: int) -> Program:
        """The same program with nothing in place of one instruction."""
        nothing = replace(self.instructions[place], opcode=("nop",), operands=(), guard=None)
        instructions = (*self.instructions[:place], nothing, *self.instructions[place + 1 :])
        return replace(self, instructions=instructions)


def parse(text: str, shared_bytes: int = 0) -> Program:
    """The one kernel of a module."""
    text = re.sub(r"//[^\n]*", "", text)
    (entry,) = re.finditer(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)([^{]*)\{", text)
    threads = re.search(r"\.(?:req|max)ntid\s+(\d+)", entry[3])
    assert threads, "the number of threads is not declared"
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    widths: dict[str, int] = {}
    singles: set[str] = set()
    for line, statement in _statements(text[entry.end() :], text.count("\n", 0, entry.end()) + 1):
        if statement.endswith(":"):
            labels[statement[:-1].strip()] = len(instructions)
        elif declared := re.fullmatch(r"\.reg\s+\.(\w+)\s+([%\w]+)(<\d+>)?", statement):
            kind, name, is_many = declared.groups()
            if widths.setdefault(name, bits_of(kind)) != bits_of(kind):
                raise Unsupported(f"line {line}: two registers named {name}, of different widths")
            if not is_many:
                singles.add(name)
        elif statement.startswith("."):
            raise Unsupported(f"line {line}: {statement}")
        else:
            instructions.append(_instruction(statement, line, singles))
    parameters = (each.split() for each in entry[2].split(",") if each.strip())
    return Program(
        name=entry[1],
        threads=int(threads[1]),
        shared_bytes=shared_bytes,
        parameters=tuple(Parameter(words[-1], words[1].lstrip(".")) for words in parameters),
        widths=widths,
        instructions=tuple(instructions),
        labels=labels,
    )


def bits_of(kind: str) -> int:
    """Of a type such as u32, f64, b8 or pred."""
    return 1 if kind == "pred" else int(kind.lstrip("bfsu"))


def _statements(body: str, first_line: int) -> Iterator[tuple[int, str]]:
    """Labels, with their colon, and statements, without their semicolon, up to the end of the function."""
    depth, held = 1, ""
    for line, rest in enumerate(body.split("\n"), first_line):
        rest = rest.strip()
        while rest and not rest.startswith(_IGNORED):
            if not held and rest[0] in "{}":
                depth += 1 if rest[0] == "{" else -1
                if depth == 0:
                    return
                rest = rest[1:].lstrip()
            elif not held and (label := re.match(r"[\w$]+\s*:(?!:)", rest)):
                yield line, label[0]
                rest = rest[label.end() :].lstrip()
            else:
                statement, is_whole, rest = rest.partition(";")
                held, rest = f"{held} {statement}".strip(), rest.lstrip()
                if is_whole:
                    yield line, held
                    held = ""


def _instruction(statement: str, line: int, singles: set[str]) -> Instruction:
    found = re.fullmatch(r"(?:@(!?)(%?\w+)\s+)?([a-z][\w.:]*)\s*(.*)", statement, re.DOTALL)
    if not found:
        raise Unsupported(f"line {line}: {statement}")
    operands = tuple(_named(_operand(each), singles) for each in _split(found[4]))
    text = " ".join(statement.split())
    return Instruction(
        text,
        line,
        found[2],
        bool(found[1]),
        tuple(found[3].replace("shared::cta", "shared").split(".")),
        operands,
    )


def _named(operand: Operand, singles: set[str]) -> Operand:
    """Registers that are declared one by one have names like any others."""
    match operand:
        case Symbol(name) if name in singles:
            return Register(name)
        case Vector(elements):
            return Vector(tuple(_named(each, singles) for each in elements))
        case Address(Symbol(name), offset) if name in singles:
            return Address(Register(name), offset)
    return operand


def _split(text: str) -> Iterator[str]:
    """At the commas that stand in no bracket."""
    depth, held = 0, ""
    for letter in text:
        depth += (letter in "{[(") - (letter in "}])")
        if letter == "," and depth == 0:
            yield held.strip()
            held = ""
        else:
            held += letter
    if held.strip():
        yield held.strip()


def _operand(text: str) -> Operand:
    if text[0] == "{":
        return Vector(tuple(_operand(each) for each in _split(text[1:-1])))
    if text[0] == "[":
        found = re.fullmatch(r"([%\w$]+)?\s*(?:\+?\s*(-?\d+))?", text[1:-1].strip())
        if not found:
            raise Unsupported(text)
        base = _operand(found[1]) if found[1] else None
        if isinstance(base, Immediate):
            return Address(None, base.bits)
        assert base is None or isinstance(base, Register | Symbol)
        return Address(base, int(found[2] or 0))
    if "|" in text:
        return Pair(*(_operand(each) for each in text.split("|")))
    if _SPECIAL.fullmatch(text):
        return Special(text)
    if text[0] == "%" or text == "_":
        return Register(text)
    if bits := re.fullmatch(r"0[fFdD]([0-9a-fA-F]+)", text):
        return Immediate(int(bits[1], 16))
    if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)", text):
        return Immediate(int(text, 0))
    return Symbol(text)
