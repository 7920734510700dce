"""Reads a compiled program: its collectives, and the bytes that it moves to and from memory.

The input is XLA's HLO as text, from `compiled.as_text()`. The compiler's own cost analysis counts
the body of a loop once, which says little about scanned blocks. Here every computation is followed
from the entry, and counted as often as its loops repeat.

Why text: `compiled.runtime_executable().hlo_modules()` also gives a module compiled for a TPU
topology, and its serialized proto has all that is read here. But neither jaxlib nor another
dependency contains the Python classes of that proto (hlo_pb2 is a part of TensorFlow), and
jaxlib's own HloInstruction has no shape, called computations or attributes.
"""

import dataclasses
import math
import re
from collections import Counter

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)

_ITEM_BITS = {
    "pred": 8,
    "s4": 4,
    "u4": 4,
    "s8": 8,
    "u8": 8,
    "s16": 16,
    "u16": 16,
    "bf16": 16,
    "f16": 16,
    "s32": 32,
    "u32": 32,
    "f32": 32,
    "s64": 64,
    "u64": 64,
    "f64": 64,
    "c64": 64,
    "c128": 128,
}
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*)$")
_ARRAY = re.compile(r"\b(pred|[suf]\d+|bf16|f8\w+|c64|c128)\[([\d,]*)\](\{[^{}]*\})?")
_CALLED = re.compile(
    r"\b(calls|to_apply|body|condition|branch_computations|true_computation|false_computation)"
    r"=(\{[^}]*\}|%?[\w.\-]+)"
)
# Instructions that move no bytes themselves: they name existing data or are counted elsewhere.
_NO_TRAFFIC = (
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "conditional",
    "call",
    "partition-id",
    "replica-id",
    "after-all",
    "iota",
    "add-dependency",
    "optimization-barrier",
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One operation between devices, as one device sees it."""

    kind: str
    bytes: int  # of the largest array: the result of a gather, the operand of a reduction
    group: int  # number of devices that take part
    times: int  # number of executions per step

    @property
    def sent(self) -> float:
        """The least number of bytes that each device sends per step (on a ring)."""
        share = (self.group - 1) / self.group if self.group > 1 else 0.0
        factor = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.kind, share)
        return factor * self.bytes * self.times


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    rest: str  # of the line, after the opening parenthesis
    is_root: bool

    def called(self, *keys: str) -> list[str]:
        """Names of the computations that these attributes name."""
        names = []
        for key, value in _CALLED.findall(self.rest):
            if key in keys:
                names += [name.strip().lstrip("%") for name in value.strip("{}").split(",")]
        return names


class HloModule:
    """A parsed module.

    Args:
      text: of `compiled.as_text()`.
    """

    def __init__(self, text: str):
        self._computations: dict[str, dict[str, _Instruction]] = {}
        self._entry, self._devices, current = "", 1, None
        partitions = re.search(r"num_partitions=(\d+)", text[:100_000])
        if partitions:
            self._devices = int(partitions[1])
        for line in text.splitlines():
            if current is None:
                header = _HEADER.match(line)
                if header:
                    current = self._computations.setdefault(header[2], {})
                    self._entry = header[2] if header[1] else self._entry
            elif line.startswith("}"):
                current = None
            elif found := _INSTRUCTION.match(line):
                root, name, shape, opcode, rest = found.groups()
                current[name] = _Instruction(name, shape, opcode, _operands(rest), rest, bool(root))
        # How often each computation runs, including those inside fusions.
        self._times: Counter[str] = Counter()
        self._fused: set[str] = set()
        self._count_executions(self._entry, 1, False)

    def _count_executions(self, name: str, times: int, fused: bool) -> None:
        self._times[name] += times
        if fused:
            self._fused.add(name)
        for instruction in self._computations.get(name, {}).values():
            if instruction.opcode == "while":
                [body], [condition] = instruction.called("body"), instruction.called("condition")
                trips = self._trip_count(instruction, condition)
                self._count_executions(body, times * trips, fused)
                continue
            inside = fused or instruction.opcode not in ("call", "conditional")
            for called in instruction.called(
                "calls", "branch_computations", "true_computation", "false_computation"
            ):
                self._count_executions(called, times, inside)
            if instruction.opcode == "call":
                for called in instruction.called("to_apply"):
                    self._count_executions(called, times, fused)

    def _trip_count(self, loop: _Instruction, condition: str) -> int:
        """The trip count that the compiler states, else the constant in the loop's condition."""
        stated = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest)
        if stated:
            return int(stated[1])
        names, numbers = [condition], []
        while names:
            for instruction in self._computations.get(names.pop(), {}).values():
                if instruction.opcode == "constant" and instruction.shape.startswith("s32[]"):
                    numbers.append(int(instruction.rest.split(")")[0]))
                names += instruction.called("calls", "to_apply")
        return max(numbers, default=1)

    def mentions(self, name: str) -> bool:
        """Whether the name of an executed instruction contains `name`, as calls of a kernel do."""
        return any(
            self._times[c] and name in i for c, inside in self._computations.items() for i in inside
        )

    def collectives(self) -> list[Collective]:
        """All collectives; one that the compiler has split over several fusions counts once."""
        found: dict = {}
        for name, computation in self._computations.items():
            times = self._times[name]
            if not times:
                continue
            for instruction in computation.values():
                kind = instruction.opcode.removesuffix("-start")
                if kind not in COLLECTIVES:
                    continue
                size = self._largest(instruction, computation)
                # On TPUs, reduce-scatter is a fusion of an all-reduce and a slice of its result.
                if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
                    kind = "reduce-scatter"
                one = Collective(kind, size, self._group(instruction), times)
                # The pieces of one collective share all of these; others may share a channel.
                channel, origin = (
                    re.search(p, instruction.rest)
                    for p in (r"channel_id=\d+", r'op_name="[^"]*"( stack_frame_id=\d+)?')
                )
                key = (kind, size, one.group, channel and channel[0], origin and origin[0])
                if kind == "collective-permute" or not channel:
                    key = (name, instruction.name)
                if key not in found or (one.times, one.bytes) > (
                    found[key].times,
                    found[key].bytes,
                ):
                    found[key] = one
        return list(found.values())

    def _largest(self, instruction: _Instruction, computation) -> int:
        """Bytes of all results or of all operands, whichever are more.

        For the start of an asynchronous operation only those of the largest array.
        """
        results = [size for size, _ in _arrays(instruction.shape)]
        if instruction.opcode.endswith("-start"):
            return max(results, default=0)
        operands = [
            size
            for name in instruction.operands
            if name in computation
            for size, _ in _arrays(computation[name].shape)
        ]
        return max(sum(results), sum(operands))

    def _group(self, instruction: _Instruction) -> int:
        rest = instruction.rest
        if found := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
            return found[1].count(",") + 1
        if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", rest):
            return int(found[2])
        if found := re.search(r"replica_groups=mesh\[([^\]]*)\].*?\{([^{}]*)\}", rest):
            sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
            return math.prod(sizes[name] for name in re.findall(r"'(\w+)'", found[2]))
        return self._devices

    def memory_bytes(self) -> float:
        """Bytes that instructions read from and write to the device's main memory.

        An array counts at every instruction that uses it, as if there were no cache. Arrays that
        the compiler keeps in fast memory do not count. Of an array that is sliced or updated in
        place, only that part counts.
        """
        total = 0.0
        for name, computation in self._computations.items():
            times = self._times[name]
            if not times or name in self._fused:
                continue
            for instruction in computation.values():
                total += times * self._bytes_moved(instruction, computation)
        return total

    def _bytes_moved(self, instruction: _Instruction, computation) -> float:
        opcode = instruction.opcode
        if opcode in _NO_TRAFFIC or opcode.endswith("-done"):
            return 0.0
        result = sum(size for size, main in _arrays(instruction.shape) if main)
        if opcode.endswith("-start"):  # the result contains both target and source
            return result
        operands: list[float] = [
            sum(size for size, main in _arrays(computation[o].shape) if main)
            if o in computation
            else 0
            for o in instruction.operands
        ]
        if opcode in ("dynamic-slice", "slice", "gather"):
            return 2 * result if operands and operands[0] else result
        if opcode == "dynamic-update-slice":
            return 2 * operands[1]
        if opcode == "custom-call" and 'custom_call_target="AllocateBuffer"' in instruction.rest:
            return 0.0
        if opcode == "fusion":
            for called in instruction.called("calls"):
                inside = self._computations.get(called, {})
                parameters = {
                    int(i.rest.split(")")[0]): i for i in inside.values() if i.opcode == "parameter"
                }
                for number, parameter in parameters.items():
                    if number < len(operands) and operands[number]:
                        operands[number] = min(operands[number], self._part_used(parameter, inside))
                root = next((i for i in inside.values() if i.is_root), None)
                parts = (
                    [inside.get(o) for o in root.operands]
                    if root is not None and root.opcode == "tuple"
                    else [root]
                )
                for part in parts:
                    part = _skip_copies(part, inside)
                    if (
                        part is not None
                        and part.opcode == "dynamic-update-slice"
                        and len(part.operands) > 1
                        and part.operands[1] in inside
                    ):
                        whole = sum(size for size, _ in _arrays(part.shape))
                        update = sum(size for size, _ in _arrays(inside[part.operands[1]].shape))
                        result -= max(0, min(result, whole - update))
        return result + sum(operands)

    def _part_used(self, parameter: _Instruction, inside) -> float:
        """Bytes of a parameter that a fusion reads; inf where it is not only sliced or updated."""
        total, names = 0.0, [parameter.name]
        while names:
            name = names.pop()
            for user in inside.values():
                if name not in user.operands:
                    continue
                if user.opcode == "bitcast":
                    names.append(user.name)
                elif (
                    user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == name
                ):
                    total += sum(size for size, _ in _arrays(user.shape))
                elif user.opcode == "fusion":  # a nested fusion
                    for called in user.called("calls"):
                        deeper = self._computations.get(called, {})
                        for own in deeper.values():
                            if (
                                own.opcode == "parameter"
                                and user.operands[int(own.rest.split(")")[0])] == name
                            ):
                                total += self._part_used(own, deeper)
                elif user.opcode != "dynamic-update-slice" or user.operands[0] != name:
                    return math.inf
        return total


def _skip_copies(instruction, inside):
    """The instruction whose value bitcasts and copies pass on."""
    while (
        instruction is not None
        and instruction.opcode in ("bitcast", "copy")
        and instruction.operands
    ):
        instruction = inside.get(instruction.operands[0])
    return instruction


def _operands(rest: str) -> tuple[str, ...]:
    """Names of the operands: what stands before the closing parenthesis."""
    depth, end = 1, len(rest)
    for i, char in enumerate(rest):
        depth += (char == "(") - (char == ")")
        if depth == 0:
            end = i
            break
    return tuple(re.findall(r"%([\w.\-]+)", rest[:end]))


def _arrays(shape: str) -> list[tuple[int, bool]]:
    """The arrays of a shape, which may be a tuple: bytes, and whether they are in main memory."""
    found = []
    for dtype, dims, layout in _ARRAY.findall(shape):
        bits = _ITEM_BITS.get(dtype, 8)
        items = math.prod(int(d) for d in dims.split(",") if d)
        space = re.search(r"S\((\d+)\)", layout)
        found.append((math.ceil(items * bits / 8), not space or space[1] == "0"))
    return found
