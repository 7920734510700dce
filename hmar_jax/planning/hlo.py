"""Reads a compiled program (XLA's HLO, as `compiled.as_text()` prints it): collectives, and bytes moved to and from memory.

The compiler's own cost analysis counts the body of a loop once, so it says nothing of scanned blocks. Here every
computation is followed from the entry and counted as often as its loops turn.
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
    r"\b(calls|to_apply|body|condition|branch_computations|true_computation|false_computation)=(\{[^}]*\}|%?[\w.\-]+)"
)
# What moves no bytes by itself: names for what is there, and what is counted elsewhere.
_FREE = (
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
    """One operation between devices, of one device, each time it is done."""

    kind: str
    bytes: int  # of the largest array: the gathered one, the one that is reduced
    group: int  # how many devices take part
    times: int  # a step

    @property
    def sent(self) -> float:
        """Bytes that leave each device at least, all times together (around a ring)."""
        share = (self.group - 1) / self.group if self.group > 1 else 0.0
        factor = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.kind, share)
        return factor * self.bytes * self.times


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    rest: str  # of the line, from the operands on
    root: bool

    def called(self, *keys: str) -> list[str]:
        names = []
        for key, value in _CALLED.findall(self.rest):
            if key in keys:
                names += [name.strip().lstrip("%") for name in value.strip("{}").split(",")]
        return names


class Program:
    """A parsed module."""

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
        # How often each computation runs, fusions' insides among them.
        self._times: Counter = Counter()
        self._fused: set[str] = set()
        self._follow(self._entry, 1, False)

    def _follow(self, name: str, times: int, fused: bool) -> None:
        self._times[name] += times
        if fused:
            self._fused.add(name)
        for instruction in self._computations.get(name, {}).values():
            if instruction.opcode == "while":
                [body], [condition] = instruction.called("body"), instruction.called("condition")
                turns = self._turns(instruction, condition)
                self._follow(body, times * turns, fused)
                continue
            inside = fused or instruction.opcode not in ("call", "conditional")
            for called in instruction.called(
                "calls", "branch_computations", "true_computation", "false_computation"
            ):
                self._follow(called, times, inside)
            if instruction.opcode == "call":
                for called in instruction.called("to_apply"):
                    self._follow(called, times, fused)

    def _turns(self, loop: _Instruction, condition: str) -> int:
        """Of a loop: as the compiler says, else the number that its counter is compared with."""
        said = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest)
        if said:
            return int(said[1])
        names, numbers = [condition], []
        while names:
            for instruction in self._computations.get(names.pop(), {}).values():
                if instruction.opcode == "constant" and instruction.shape.startswith("s32[]"):
                    numbers.append(int(re.match(r"-?\d+", instruction.rest)[0]))
                names += instruction.called("calls", "to_apply")
        return max(numbers, default=1)

    def mentions(self, name: str) -> bool:
        """Whether an instruction that runs has this in its name, as calls of a kernel do."""
        return any(
            self._times[c] and name in i for c, inside in self._computations.items() for i in inside
        )

    def collectives(self) -> list[Collective]:
        """All of them. One that the compiler has spread over several fusions is one."""
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
                # TPUs' reduce-scatter: a fusion around an all-reduce, whose devices keep a part of the result.
                if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
                    kind = "reduce-scatter"
                one = Collective(kind, size, self._group(instruction), times)
                # Pieces of one collective share all of these; different ones may share a channel.
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
        """Bytes of all results together, or of all operands, whichever are more; of an async start only the largest array."""
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

        Each array counts where an instruction uses it, as if nothing stayed in a cache; what the compiler has placed in
        fast memory does not count, and of what is sliced or updated in place only the part.
        """
        total = 0.0
        for name, computation in self._computations.items():
            times = self._times[name]
            if not times or name in self._fused:
                continue
            for instruction in computation.values():
                total += times * self._moved(instruction, computation)
        return total

    def _moved(self, instruction: _Instruction, computation) -> float:
        opcode = instruction.opcode
        if opcode in _FREE or opcode.endswith("-done"):
            return 0.0
        result = sum(size for size, main in _arrays(instruction.shape) if main)
        if opcode.endswith("-start"):  # its result has target and source in it
            return result
        operands = [
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
                root = next((i for i in inside.values() if i.root), None)
                parts = (
                    [inside.get(o) for o in root.operands]
                    if root is not None and root.opcode == "tuple"
                    else [root]
                )
                for part in parts:
                    part = _behind_names(part, inside)
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
        """Bytes that a fusion reads of a parameter: less than all where it is only sliced, or updated in place."""
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
                elif user.opcode == "fusion":  # one inside another
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


def _behind_names(instruction, inside):
    while (
        instruction is not None
        and instruction.opcode in ("bitcast", "copy")
        and instruction.operands
    ):
        instruction = inside.get(instruction.operands[0])
    return instruction


def _operands(rest: str) -> tuple[str, ...]:
    depth, end = 1, len(rest)
    for i, letter in enumerate(rest):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            end = i
            break
    return tuple(re.findall(r"%([\w.\-]+)", rest[:end]))


def _arrays(shape: str) -> list[tuple[int, bool]]:
    """Of an array or a tuple of them: bytes of each, and whether it is in main memory."""
    found = []
    for dtype, dims, layout in _ARRAY.findall(shape):
        bits = _ITEM_BITS.get(dtype, 8)
        items = math.prod(int(d) for d in dims.split(",") if d)
        space = re.search(r"S\((\d+)\)", layout)
        found.append((math.ceil(items * bits / 8), not space or space[1] == "0"))
    return found
