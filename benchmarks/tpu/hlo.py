"""Compiled HLO text as computations of instructions: what :mod:`benchmarks.tpu.counting` counts."""

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from functools import cached_property

#: Bytes of an element; what is not listed, such as a token, holds no data.
_ITEM_BYTES = {
    **dict.fromkeys(("pred", "s8", "u8", "f8e4m3fn", "f8e5m2"), 1),
    **dict.fromkeys(("s16", "u16", "f16", "bf16"), 2),
    **dict.fromkeys(("s32", "u32", "f32"), 4),
    **dict.fromkeys(("s64", "u64", "f64", "c64"), 8),
    "c128": 16,
}
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^{}]*)\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*)$")
_NAME = re.compile(r"%([\w.-]+)")
_CALLED = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.-]+)")


@dataclasses.dataclass(frozen=True)
class Shape:
    """The type of an array.

    Attributes:
      dtype: as HLO writes it, such as "bf16".
      dims: sizes, outermost first.
      order: dimensions from minor to major.
      tile: of the innermost dimensions, to which they are padded; empty: not padded.
      space: 0 is the main memory (HBM), others are the chip's own.
    """

    dtype: str
    dims: tuple[int, ...]
    order: tuple[int, ...] = ()
    tile: tuple[int, ...] = ()
    space: int = 0

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.dims)

    @property
    def is_float(self) -> bool:
        return self.dtype.startswith(("f", "bf"))

    @property
    def bytes(self) -> int:
        """Bytes in memory, the padding to tiles included."""
        dims = list(self.dims)
        for axis, tile in zip(self.order, reversed(self.tile), strict=False):
            dims[axis] = -(-dims[axis] // tile) * tile
        return math.prod(dims) * _ITEM_BYTES.get(self.dtype, 0)

    @property
    def bytes_in_hbm(self) -> int:
        """The same; 0 for what stays on the chip."""
        return self.bytes if self.space == 0 else 0


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One operation.

    Attributes:
      name: unique in its computation.
      opcode: such as "fusion".
      shapes: of its result; several for a tuple.
      operands: names, in order.
      literal: what stands in the operands' place, for parameters and constants.
      attributes: the rest of its line.
    """

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    literal: str
    attributes: str

    @property
    def shape(self) -> Shape:
        """The result's; the first one's of a tuple."""
        return self.shapes[0]

    @property
    def called(self) -> list[str]:
        """Names of the computations that it runs, a loop's condition left out."""
        branches = re.search(r"branch_computations=\{([^}]*)\}", self.attributes)
        found = _CALLED.findall(self.attributes)
        return found + (_NAME.findall(branches[1]) if branches else [])

    def attribute(self, name: str) -> str:
        """The value of ``name={…}`` or ``name=…``; empty where there is none."""
        found = re.search(rf"\b{name}=(?:\{{([^}}]*)\}}|([\w.%>-]+))", self.attributes)
        return (found[1] or found[2] or "") if found else ""


class Computation:
    """Instructions in order; the last one is the result."""

    def __init__(self, instructions: Sequence[Instruction]):
        self.instructions = tuple(instructions)
        self.root = instructions[-1]

    @cached_property
    def by_name(self) -> dict[str, Instruction]:
        return {instruction.name: instruction for instruction in self.instructions}

    @cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Name -> the instructions that take it."""
        found: dict[str, list[Instruction]] = {name: [] for name in self.by_name}
        for instruction in self.instructions:
            for name in dict.fromkeys(instruction.operands):
                found[name].append(instruction)
        return found

    @cached_property
    def parameters(self) -> dict[int, Instruction]:
        """By number."""
        return {int(i.literal): i for i in self.instructions if i.opcode == "parameter"}

    def operands(self, instruction: Instruction) -> list[Instruction]:
        return [self.by_name[name] for name in instruction.operands]


class Module:
    """A compiled program: computations by name, and the one that is run.

    Args:
      text: what ``compiled.as_text()`` returns.

    Raises:
      ValueError: for a text without an entry computation.
    """

    def __init__(self, text: str):
        self.computations: dict[str, Computation] = {}
        entry = ""
        for is_entry, name, instructions in _computations(text):
            self.computations[name] = Computation(instructions)
            entry = name if is_entry else entry
        if not entry:
            raise ValueError("The text holds no ENTRY computation: it is not compiled HLO.")
        self.entry = self.computations[entry]

    def called(self, instruction: Instruction) -> list[Computation]:
        return [self.computations[name] for name in instruction.called]


def _computations(text: str) -> Iterator[tuple[bool, str, list[Instruction]]]:
    header: re.Match[str] | None = None
    instructions: list[Instruction] = []
    for line in text.splitlines():
        if header is None:
            header, instructions = _HEADER.match(line), []
        elif line.startswith("}"):
            yield bool(header[1]), header[2], instructions
            header = None
        elif found := _INSTRUCTION.match(line):
            instructions.append(_instruction(found[1], found[2]))


def _instruction(name: str, rest: str) -> Instruction:
    end = _closing(rest) if rest.startswith("(") else rest.index(" ") - 1
    kind, rest = rest[: end + 1], rest[end + 2 :]
    opcode, _, after = rest.partition("(")
    end = _closing("(" + after)
    inside, attributes = after[: end - 1], after[end:]
    operands = () if opcode in ("parameter", "constant") else tuple(_NAME.findall(inside))
    return Instruction(name, opcode, shapes_of(kind), operands, inside, attributes)


def _closing(text: str) -> int:
    """Where the parenthesis that opens the text closes."""
    depth = 0
    for place, sign in enumerate(text):
        depth += (sign == "(") - (sign == ")")
        if depth == 0:
            return place
    raise ValueError(f"A parenthesis stays open in {text[:80]!r}.")


def shapes_of(kind: str) -> tuple[Shape, ...]:
    """The arrays of a type, such as ``(f32[2,3]{1,0:T(8,128)S(1)}, s32[])``."""
    found = []
    for dtype, dims, layout in _SHAPE.findall(kind):
        order, _, rest = layout.partition(":")
        tile, space = re.match(r"T\(([\d,]+)\)", rest), re.search(r"S\((\d+)\)", rest)
        sizes, minor, tiles = map(_numbers, (dims, order, tile[1] if tile else ""))
        found.append(Shape(dtype, sizes, minor, tiles, int(space[1]) if space else 0))
    return tuple(found)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part.strip().isdigit())
