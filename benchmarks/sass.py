"""Reads the machine code of a CUDA kernel: what its threads wait for, and what it takes of a
multiprocessor. Needs no GPU, but the disassembler that comes with Triton.

A load is in flight from its issue until something waits for it: a plain one until the first
instruction that uses its registers, an asynchronous copy to shared memory (LDGSTS) until a DEPBAR
that leaves no group of its age outstanding.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

WIDE = ".128"  # of a load of 16 bytes
ROUNDS = 3  # of a loop that are looked at, so that the last finds what the ones before left
RESERVED_SHARED_BYTES = 1024  # that the driver takes of every block, from compute capability 8.0 on
REGISTERS, REGISTER_UNIT, WARP = 65536, 256, 32  # of a multiprocessor; given to a warp at once
# Shared memory and warps of a multiprocessor by compute capability (CUDA programming guide).
MULTIPROCESSORS = {
    80: (164 << 10, 64),
    86: (100 << 10, 48),
    87: (164 << 10, 48),
    89: (100 << 10, 48),
    90: (228 << 10, 64),
    100: (228 << 10, 64),
    103: (228 << 10, 64),
    110: (228 << 10, 48),
    120: (100 << 10, 48),
    121: (100 << 10, 48),
}


@dataclass(frozen=True)
class Instruction:
    """One line of machine code. text: without its predicate."""

    address: int
    text: str

    @property
    def name(self) -> str:
        """The instruction's mnemonic with its modifiers."""
        return self.text.split()[0]

    @property
    def operands(self) -> list[str]:
        """The operands, as they are spelled."""
        return [part.strip() for part in self.text[len(self.name) :].split(",")]

    @property
    def branch(self) -> int | None:
        """Address at which it may go on instead of below."""
        found = re.search(r"0x([0-9a-f]+)$", self.text)
        return int(found[1], 16) if self.name.startswith("BRA") and found else None


@dataclass(frozen=True)
class KernelUse:
    """Resources of one thread of a kernel. stack_bytes: of registers that were spilled."""

    registers: int
    stack_bytes: int


def instructions(cubin: Path) -> list[Instruction]:
    """The machine code of a cubin with one kernel, in order."""
    lines = _cuobjdump("--dump-sass", cubin).splitlines()
    found = (
        re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\d+ +)?(.*?) *;", line) for line in lines
    )
    return [Instruction(int(match[1], 16), match[2]) for match in found if match]


def kernel_use(cubin: Path) -> KernelUse:
    """Registers a thread and bytes of its stack."""
    found = re.search(r"REG:(\d+) STACK:(\d+)", _cuobjdump("-res-usage", cubin))
    if found is None:
        raise ValueError(f"cuobjdump lists no resources of {cubin}")
    return KernelUse(int(found[1]), int(found[2]))


def wide_loads_in_flight(code: list[Instruction]) -> int:
    """Fewest 16-byte loads that a thread has on their way whenever it waits for one of them, in the
    last round of any loop; 0 where no loop has such loads.
    """
    return min(
        (
            _fewest_in_flight(code[: last + 1], code[first : last + 1])
            for first, last in loops(code)
        ),
        default=0,
    )


def loops(code: list[Instruction]) -> list[tuple[int, int]]:
    """First and last instruction of every innermost loop with 16-byte loads."""
    place = {line.address: index for index, line in enumerate(code)}
    found = [
        (place[line.branch], index)
        for index, line in enumerate(code)
        if line.branch is not None and line.branch < line.address
    ]
    inner = [
        (first, last)
        for first, last in found
        if not any(first <= begin and end < last for begin, end in found)
    ]
    return [(a, b) for a, b in inner if any(_is_wide_load(line) for line in code[a : b + 1])]


def programs_per_multiprocessor(
    target: int, use: KernelUse, shared_bytes: int, num_warps: int
) -> int:
    """Blocks that run at once, as registers, shared memory and warps allow."""
    shared, warps = MULTIPROCESSORS[target]
    of_a_warp = -(-use.registers * WARP // REGISTER_UNIT) * REGISTER_UNIT
    return min(
        REGISTERS // (of_a_warp * num_warps),
        shared // (shared_bytes + RESERVED_SHARED_BYTES),
        warps // num_warps,
    )


def _fewest_in_flight(before: list[Instruction], body: list[Instruction]) -> int:
    flight = _Flight()
    for line in before + body * (ROUNDS - 2):
        flight.pass_by(line)
    waits = [in_flight for line in body if (in_flight := flight.pass_by(line))]
    return min(waits, default=0)


class _Flight:
    """The 16-byte loads on their way while code is read line by line."""

    def __init__(self) -> None:
        self._groups: list[int] = []  # asynchronous copies, by group, oldest first
        self._open = 0  # copies whose group is not closed
        self._registers: dict[int, int] = {}  # register -> number of the plain load that fills it
        self._plain: list[int] = []  # numbers of plain loads, oldest first
        self._count = 0

    def pass_by(self, line: Instruction) -> int:
        """Loads in flight while this line waits; 0 where it does not."""
        in_flight = sum(self._groups) + self._open + len(self._plain)
        waits = self._waits(line)
        if line.name.startswith("LDGSTS"):
            self._open += _is_wide_load(line)
        elif line.name == "LDGDEPBAR":
            self._groups.append(self._open)
            self._open = 0
        elif _is_wide_load(line):
            self._count += 1
            self._plain.append(self._count)
            first = _registers(line.operands[0])[0]
            self._registers |= dict.fromkeys(range(first, first + 4), self._count)
        return in_flight if waits else 0

    def _waits(self, line: Instruction) -> bool:
        if line.name.startswith("DEPBAR") and len(line.operands) > 1:
            left = int(line.operands[1], 16)
            waits = len(self._groups) > left
            self._groups = self._groups[len(self._groups) - left :] if left else []
            return waits
        used = line.operands[1:] if _is_wide_load(line) else line.operands
        needed = [self._registers[r] for r in _registers(",".join(used)) if r in self._registers]
        if not needed:
            return False
        # loads come back in order: who has the youngest has those before it
        self._plain = [number for number in self._plain if number > max(needed)]
        self._registers = {r: n for r, n in self._registers.items() if n > max(needed)}
        return True


def _is_wide_load(line: Instruction) -> bool:
    return line.name.startswith(("LDG.", "LDGSTS.")) and WIDE in line.name


def _registers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\bR(\d+)", text)]


def _cuobjdump(option: str, cubin: Path) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, option, cubin], capture_output=True, text=True, check=True).stdout
