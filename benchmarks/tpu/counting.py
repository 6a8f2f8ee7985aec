"""What one execution of a compiled program costs a chip: operations, memory traffic, collectives.

XLA's own count (``compiled.cost_analysis()``) takes the body of a loop once. Here a body counts as
often as its loop runs, where its condition compares a counter with a constant, as that of ``scan``
does; how often others run depends on the data, and their body counts once.
"""

import dataclasses
import math
import re
from collections import Counter

from benchmarks.tpu.hlo import Computation, Instruction, Module, Shape

#: One operation per element of the result.
_ELEMENTWISE = {
    *("abs", "add", "atan2", "ceil", "clamp", "cosine", "divide", "exponential", "floor", "log"),
    *("exponential-minus-one", "log-plus-one", "logistic", "maximum", "minimum", "multiply"),
    *("negate", "power", "remainder", "round-nearest-afz", "round-nearest-even", "rsqrt", "sign"),
    *("sine", "sqrt", "subtract", "tan", "tanh"),
}
#: They move nothing by themselves.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional"),
    *("call", "async-start", "after-all", "iota", "partition-id", "replica-id", "opt-barrier"),
}
_COLLECTIVES = (
    *("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute"),
    *("collective-broadcast", "ragged-all-to-all"),
)
#: Their types are (operand, result, …); those of other starts are (result, …).
_WITH_OPERANDS = ("all-gather-start", "collective-permute-start", "slice-start")
_HOST = ("infeed", "outfeed", "send", "recv")
#: Passes of bfloat16 products that a float32 product takes, by the precision it asks for.
_PASSES = {"default": 1, "": 1, "high": 3, "highest": 6}


@dataclasses.dataclass(frozen=True)
class Costs:
    """Of one execution, on one chip.

    Attributes:
      matrix_flops: multiplications and additions of products and convolutions.
      matrix_passes: the same, each times the bfloat16 passes that its precision takes.
      float32_flops: the part of ``matrix_flops`` that takes several passes.
      elementwise_flops: one operation per element, in floating point.
      hbm_bytes: read from and written to the main memory, padding included.
      collectives: kind -> bytes of the results.
      collective_calls: kind -> how often.
      host_transfers: how often the host is asked for something.
      open_loops: loops whose number of turns depends on the data, each counted as one turn.
    """

    matrix_flops: float
    matrix_passes: float
    float32_flops: float
    elementwise_flops: float
    hbm_bytes: float
    collectives: dict[str, float]
    collective_calls: dict[str, float]
    host_transfers: float
    open_loops: float


def costs(module: Module) -> Costs:
    """Count one execution of a compiled program."""
    counted = _of_computation(module, module.entry)

    def named(prefix: str) -> dict[str, float]:
        return {k[len(prefix) :]: v for k, v in sorted(counted.items()) if k.startswith(prefix)}

    return Costs(
        matrix_flops=counted["matrix"],
        matrix_passes=counted["passes"],
        float32_flops=counted["float32"],
        elementwise_flops=counted["elementwise"],
        hbm_bytes=counted["bytes"],
        collectives=named("bytes of "),
        collective_calls=named("calls of "),
        host_transfers=counted["host"],
        open_loops=counted["open"],
    )


def _of_computation(module: Module, computation: Computation, *, fused: bool = False) -> Counter:
    """Of all instructions; what is fused moves nothing by itself."""
    total: Counter = Counter()
    for instruction in computation.instructions:
        total.update(_of_instruction(module, computation, instruction, fused))
    return total


def _of_instruction(
    module: Module, computation: Computation, instruction: Instruction, fused: bool
) -> Counter:
    opcode = instruction.opcode
    found: Counter = Counter()
    if opcode == "while":
        found.update(_of_loop(module, computation, instruction))
    elif opcode == "conditional":
        branches = [_of_computation(module, branch) for branch in module.called(instruction)]
        found.update(min(branches, key=lambda counted: counted["passes"]))
    elif opcode in ("fusion", "call", "async-start"):
        inside = fused or opcode == "fusion"
        for inner in module.called(instruction):
            found.update(_of_computation(module, inner, fused=inside))
    else:
        found.update(_operations(computation, instruction))
    if not fused and opcode not in _FREE and not opcode.endswith("-done"):
        found["bytes"] += _traffic(module, computation, instruction)
    return found


def _of_loop(module: Module, computation: Computation, loop: Instruction) -> Counter:
    turns = trip_count(module, computation, loop)
    (body,) = module.called(loop)
    found = Counter(open=int(turns is None))
    for part, often in ((body, turns or 1), (_condition(module, loop), (turns or 1) + 1)):
        counted = _of_computation(module, part)
        found.update({name: value * often for name, value in counted.items()})
    return found


def _condition(module: Module, loop: Instruction) -> Computation:
    return module.computations[loop.attribute("condition").lstrip("%")]


def trip_count(module: Module, computation: Computation, loop: Instruction) -> int | None:
    """How often a loop runs; None where its condition is no counter below a constant."""
    stated = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if stated:
        return int(stated[1])
    compared = _compared(module, _condition(module, loop))
    if compared is None:
        return None
    place, limit = compared
    (carried,) = computation.operands(loop)
    start = computation.by_name[carried.operands[place]] if carried.operands else carried
    while start.opcode in ("copy", "bitcast"):
        (start,) = computation.operands(start)
    first = _integer(start)
    return None if first is None else max(0, limit - first)


def _compared(module: Module, condition: Computation) -> tuple[int, int] | None:
    """Of a condition ``carried[place] < limit``: the place and the limit."""
    root = condition.root
    if root.opcode == "fusion":
        (inner,) = module.called(root)
        names = {inner.parameters[i].name: o for i, o in enumerate(condition.operands(root))}
        sides = [names.get(name, inner.by_name[name]) for name in inner.root.operands]
        root = inner.root
    else:
        sides = condition.operands(root)
    if root.opcode != "compare" or root.attribute("direction") != "LT":
        return None
    counter, limit = sides[0], _integer(sides[1])
    if counter.opcode != "get-tuple-element" or limit is None:
        return None
    return int(counter.attribute("index")), limit


def _integer(constant: Instruction) -> int | None:
    is_number = constant.opcode == "constant" and re.fullmatch(r"-?\d+", constant.literal)
    return int(constant.literal) if is_number else None


def _operations(computation: Computation, instruction: Instruction) -> Counter:
    opcode = instruction.opcode
    kind = opcode.removesuffix("-start")
    if opcode in ("convolution", "dot"):
        return _products(computation, instruction)
    if kind in _COLLECTIVES:
        shapes = instruction.shapes[1:2] if opcode in _WITH_OPERANDS else instruction.shapes
        moved = sum(shape.bytes for shape in shapes)
        return Counter({f"bytes of {kind}": moved, f"calls of {kind}": 1})
    if opcode in _HOST or (opcode == "custom-call" and "callback" in instruction.attributes):
        return Counter({"host": 1})
    if not instruction.shapes or not instruction.shape.is_float:
        return Counter()
    if opcode in ("reduce", "reduce-window"):
        return Counter({"elementwise": computation.operands(instruction)[0].shape.size})
    return Counter({"elementwise": instruction.shape.size}) if opcode in _ELEMENTWISE else Counter()


def _products(computation: Computation, instruction: Instruction) -> Counter:
    left, right = (operand.shape for operand in computation.operands(instruction))
    if instruction.opcode == "dot":
        axes = instruction.attribute("lhs_contracting_dims").split(",")
        flops = 2 * instruction.shape.size * math.prod(left.dims[int(a)] for a in axes if a)
    else:
        flops = convolution_flops(instruction, left, right)
    asked = instruction.attribute("operand_precision").split(",")[0]
    passes = _PASSES[asked] if left.dtype == "f32" else 1
    several = flops if passes > 1 else 0
    return Counter({"matrix": flops, "passes": flops * passes, "float32": several})


def convolution_flops(instruction: Instruction, image: Shape, kernel: Shape) -> int:
    """Multiplications and additions of a convolution; those with padding do not count."""
    of_image, _, rest = instruction.attribute("dim_labels").partition("_")
    of_kernel, _, of_out = rest.partition("->")
    window = dict(part.split("=") for part in instruction.attribute("window").split() if part)
    total = 2 * kernel.dims[of_kernel.index("i")]
    total *= math.prod(instruction.shape.dims[of_out.index(label)] for label in "bf")
    for axis in range(len(of_out) - 2):
        label = str(axis)
        total *= _meetings(
            image.dims[of_image.index(label)],
            kernel.dims[of_kernel.index(label)],
            instruction.shape.dims[of_out.index(label)],
            {name: value.split("x")[axis] for name, value in window.items()},
        )
    return total


def _meetings(size: int, taps: int, out: int, window: dict[str, str]) -> int:
    """Pairs of an output and a tap that meet the image on one axis, not its padding."""
    stride, spread, gap = (
        int(window.get(name, "1")) for name in ("stride", "rhs_dilate", "lhs_dilate")
    )
    low = int(window.get("pad", "0_0").split("_")[0])
    end = (size - 1) * gap
    places = (o * stride - low + k * spread for o in range(out) for k in range(taps))
    return sum(0 <= place <= end and place % gap == 0 for place in places)


def _traffic(module: Module, computation: Computation, instruction: Instruction) -> int:
    """Bytes that an instruction reads from and writes to the main memory.

    Of an array of which it takes a slice, or of which it replaces a part, only that part counts.
    """
    if instruction.opcode == "custom-call" and "AllocateBuffer" in instruction.attributes:
        return 0
    operands = dict.fromkeys(computation.operands(instruction))
    read = sum(
        min(operand.shape.bytes_in_hbm, _read_by(module, computation, instruction, operand))
        for operand in operands
        if operand.shapes
    )
    shapes = instruction.shapes
    if instruction.opcode.endswith("-start") and len(shapes) > 1:
        shapes = (_result(instruction),)
    parts = _written(module, computation, instruction)
    if len(parts) != len(shapes):
        parts = [shape.bytes for shape in shapes]
    return read + sum(
        min(shape.bytes_in_hbm, part) for shape, part in zip(shapes, parts, strict=True)
    )


def _read(module: Module, computation: Computation, array: Instruction) -> int:
    """Bytes of an array that a computation reads; all of it where it is the result."""
    users = computation.users[array.name]
    if not users:
        return array.shape.bytes if array == computation.root else 0
    return sum(_read_by(module, computation, user, array) for user in users)


def _read_by(
    module: Module, computation: Computation, user: Instruction, array: Instruction
) -> int:
    """Bytes of an array that one instruction reads."""
    places = [i for i, name in enumerate(user.operands) if name == array.name]
    if user.opcode in ("dynamic-slice", "slice", "slice-start") and places[0] == 0:
        return _result(user).bytes
    if user.opcode == "dynamic-update-slice" and places[0] == 0:
        return 0
    if user.opcode == "bitcast":
        return _read(module, computation, user)
    if user.opcode == "fusion":
        (inner,) = module.called(user)
        return sum(_read(module, inner, inner.parameters[i]) for i in places)
    return array.shape.bytes


def _result(instruction: Instruction) -> Shape:
    """What an instruction gives, or one that starts a transfer will have given at its end."""
    return instruction.shapes[int(instruction.opcode in _WITH_OPERANDS)]


def _written(module: Module, computation: Computation, instruction: Instruction) -> list[int]:
    """Bytes of each array that an instruction writes."""
    if instruction.opcode == "fusion":
        (inner,) = module.called(instruction)
        return _written(module, inner, inner.root)
    if instruction.opcode == "tuple":
        parts = (_written(module, computation, part) for part in computation.operands(instruction))
        return [part[0] for part in parts]
    if instruction.opcode == "bitcast":
        (source,) = computation.operands(instruction)
        if source.opcode in ("fusion", "dynamic-update-slice"):
            return _written(module, computation, source)
    if instruction.opcode == "dynamic-update-slice":
        return [computation.operands(instruction)[1].shape.bytes]
    return [shape.bytes for shape in instruction.shapes]
