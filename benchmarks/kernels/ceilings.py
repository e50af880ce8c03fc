"""What a compiled kernel may use, and what it must show: one table, held by a test.

A ceiling is what the kernel was designed to fit, not what it happened to need: raise one only
together with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.kernels.compiled import TARGETS, WIDE, Compiled
from safeopt_kernels.specialisations import Specialisation

KIB = 1024


@dataclass(frozen=True)
class Ceiling:
    """Limits of one kernel on one kind of target.

    Attributes:
        registers: vector registers a thread.
        shared: bytes of shared memory a program.
    """

    registers: int
    shared: int


# Kernel -> target -> ceiling. A multiprocessor has 65 536 registers and 163 KiB (sm_80) or 227 KiB
# of shared memory: 255 registers leave room for one program of eight warps. A compute unit of
# gfx942 has 512 registers a lane and 64 KiB.
CEILINGS: Mapping[str, Mapping[str, Ceiling]] = {
    "propose": {
        "sm_80": Ceiling(255, 96 * KIB),
        "sm_90": Ceiling(240, 96 * KIB),
        "sm_100": Ceiling(240, 96 * KIB),
        "gfx942": Ceiling(192, 32 * KIB),
    },
    "apply": {
        "sm_80": Ceiling(255, 64 * KIB),
        "sm_90": Ceiling(255, 88 * KIB),
        "sm_100": Ceiling(255, 64 * KIB),
        "gfx942": Ceiling(144, 32 * KIB),
    },
    "onesided": {
        "sm_80": Ceiling(240, 48 * KIB),
        "sm_90": Ceiling(240, 48 * KIB),
        "sm_100": Ceiling(240, 48 * KIB),
        "gfx942": Ceiling(224, 24 * KIB),
    },
}


def problems(specialisation: Specialisation, target: str, made: Compiled) -> list[str]:
    """What is wrong with a compiled kernel; empty if nothing is."""
    ceiling = CEILINGS[kernel_name(specialisation)][target]
    wanted = wide_loads_of_a_tile(specialisation, target)
    wide = sum(count for width, count in made.loads.items() if width >= WIDE)
    checks = {
        f"{made.spilled} bytes of registers spilled": made.spilled > 0,
        f"{made.registers} registers, more than {ceiling.registers}": (
            made.registers > ceiling.registers
        ),
        f"{made.shared} bytes shared, more than {ceiling.shared}": made.shared > ceiling.shared,
        f"{wide} loads of 16 bytes, its tile takes {wanted}": wide < wanted,
        "no tensor-core instruction": not made.tensor_cores,
        f"{made.atomics} atomic operations: their order is not fixed": made.atomics > 0,
    }
    return [text for text, wrong in checks.items() if wrong]


def kernel_name(specialisation: Specialisation) -> str:
    """The name of the Triton function."""
    return str(specialisation.kernel.__name__)


def wide_loads_of_a_tile(specialisation: Specialisation, target: str) -> int:
    """Loads of 16 bytes in which a thread can bring its part of what every weight needs.

    Zero where addresses or sizes are not multiples of 16, which rules wide loads out.
    """
    if specialisation.name.endswith("-any"):
        return 0
    constants = specialisation.constants
    threads = specialisation.warps * TARGETS[target].warp_size
    per_weight = _loaded_bytes(specialisation)
    return int(constants["BM"] * constants["BN"] * per_weight // (threads * WIDE))


def _loaded_bytes(specialisation: Specialisation) -> int:
    """Bytes that a tile must load for every weight, factors left out."""
    constants, signature = specialisation.constants, specialisation.signature
    name = kernel_name(specialisation)
    if name == "onesided":
        return sum(_BYTES[signature[tensor]] for tensor in ("p", "g", "m", "v"))
    weight = int(constants["WEIGHT"].primitive_bitwidth) // 8
    if name == "apply":
        return weight if constants["IN_PLACE"] else 2 * weight
    return 2 * weight + 2 * int(constants["MOMENT"].primitive_bitwidth) // 8


_BYTES = {"*fp32": 4, "*fp16": 2, "*bf16": 2}
