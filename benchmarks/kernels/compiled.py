"""What a compiler makes of a kernel: registers, spills, shared memory, loads, tensor cores.

Kernels are compiled ahead of time, for GPUs that need not be there: Triton's wheel brings the
NVIDIA assembler and the AMD back end. Registers and spills come from what ``ptxas -v`` tells Triton
or from the metadata that the AMD back end writes into the assembly.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from tempfile import TemporaryDirectory

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from safeopt_kernels.specialisations import Specialisation

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
WIDE = 16  # bytes: the widest load that every target has


@dataclass(frozen=True)
class Compiled:
    """Figures of one kernel, specialised and compiled for one target.

    Attributes:
        registers: vector registers a thread.
        spilled: bytes a thread keeps in memory because registers ran out (stack included).
        shared: bytes of shared memory a program.
        loads: bytes of a load instruction -> how many of them stand in the code.
        tensor_cores: instruction -> how many of them stand in the code.
        atomics: atomic operations on global memory that stand in the code.
    """

    registers: int
    spilled: int
    shared: int
    loads: Mapping[int, int]
    tensor_cores: Mapping[str, int]
    atomics: int

    @property
    def wide_share(self) -> float:
        """Share of the loaded bytes that come 16 or more at a time, counted in the code."""
        total = sum(width * count for width, count in self.loads.items())
        wide = sum(width * count for width, count in self.loads.items() if width >= WIDE)
        return wide / total if total else 0.0


def compile_for(specialisation: Specialisation, target: str) -> Compiled:
    """Compile one form of a kernel for one target, as the JIT would when it is launched.

    Args:
        specialisation: of the target's backend.
        target: a key of `TARGETS`.
    """
    source = ASTSource(
        specialisation.kernel,
        specialisation.full_signature,
        dict(specialisation.constants),
        specialisation.attributes,
    )
    options = {"num_warps": specialisation.warps}
    with _assembler_log() as log:
        made = triton.compile(source, target=TARGETS[target], options=options)
    if backend(target) == "cuda":
        return _read_ptx(made.asm["ptx"], log.getvalue(), made.metadata.shared)
    return _read_amdgcn(made.asm["amdgcn"], made.metadata.shared)


@contextmanager
def _assembler_log() -> Iterator[StringIO]:
    """Catch what ptxas says while Triton compiles; an empty cache makes sure that it compiles."""
    with TemporaryDirectory() as folder, knobs.cache.scope(), knobs.nvidia.scope():
        knobs.cache.dir, knobs.nvidia.dump_ptxas_log = folder, True
        with redirect_stdout(StringIO()) as log:
            yield log


def backend(target: str) -> str:
    """Return "cuda" or "hip"."""
    return str(TARGETS[target].backend)


def _read_ptx(text: str, log: str, shared: int) -> Compiled:
    spills = re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", log)
    return Compiled(
        registers=_number(r"Used (\d+) registers", log),
        spilled=sum(map(int, spills)),
        shared=shared,
        loads=dict(Counter(_ptx_loads(text))),
        tensor_cores=_counted(
            r"\b((?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\.\S*m?\w*)", _code(text, "//")
        ),
        atomics=len(re.findall(r"\b(?:atom|red)\.(?:\w+\.)*global", text)),
    )


def _ptx_loads(text: str) -> Iterator[int]:
    """Bytes of every load from global memory, to registers or straight to shared memory."""
    for vector, bits in re.findall(
        r"\bld\.global(?:\.\w+(?:::\w+)*)*?(?:\.v(\d))?\.[bfus](\d+)", text
    ):
        yield int(vector or 1) * int(bits) // 8
    for size in re.findall(r"\bcp\.async\.c[ag]\.shared\.global[^;]*?, (0x\w+|\d+)[,;]", text):
        yield int(size, 0)


def _read_amdgcn(text: str, shared: int) -> Compiled:
    private = _number(r"\.private_segment_fixed_size:\s*(\d+)", text)
    spilled_registers = _number(r"\.vgpr_spill_count:\s*(\d+)", text)
    loads = re.findall(r"\b(?:global|buffer)_load_(?:lds_)?(\w+)", text)
    return Compiled(
        registers=_number(r"\.vgpr_count:\s*(\d+)", text),
        spilled=private + 4 * spilled_registers,
        shared=shared,
        loads=dict(Counter(_AMD_WIDTHS[kind] for kind in loads)),
        tensor_cores=_counted(r"\b(v_mfma_\w+)", text),
        atomics=len(re.findall(r"\b(?:global|buffer|flat)_atomic_\w+", text)),
    )


_AMD_WIDTHS = {
    "dwordx4": 16,
    "dwordx3": 12,
    "dwordx2": 8,
    "dword": 4,
    "ushort": 2,
    "sshort": 2,
    "short_d16": 2,
    "short_d16_hi": 2,
    "ubyte": 1,
    "sbyte": 1,
    "ubyte_d16": 1,
    "ubyte_d16_hi": 1,
}


def _counted(pattern: str, text: str) -> dict[str, int]:
    return dict(Counter(re.findall(pattern, text)))


def _code(text: str, comment: str) -> str:
    return "\n".join(line.partition(comment)[0] for line in text.splitlines())


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"the compiler's output has nothing like {pattern!r}")
    return int(found[1])
