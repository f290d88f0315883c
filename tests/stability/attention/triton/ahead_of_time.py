"""Compiles a kernel for a GPU that is not there; reads registers, spills and loops from the machine code."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Compiled:
    """What Triton and its ptxas made of a kernel.

    Attributes:
        ptx: The intermediate code.
        registers: Per thread.
        spilled_bytes: Per thread, anywhere in the kernel.
        loop_spills: Loads from and stores to local memory inside loops that multiply matrices.
        num_products: Matrix instructions inside loops.
        shared_memory: Bytes a program needs.
    """

    ptx: str
    registers: int
    spilled_bytes: int
    loop_spills: int
    num_products: int
    shared_memory: int


def compile_ahead(
    kernel: Any,
    pointers: dict[str, str],
    constants: dict[str, Any],
    *,
    capability: int,
    num_warps: int,
    num_stages: int,
) -> Compiled:
    """Compiles for sm_`capability`; strides and pointers are multiples of 16, as torch's mostly are."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    names = kernel.arg_names
    constants = {name: value for name, value in constants.items() if name in names}
    signature = {}
    for name in names:
        kind = "fp32" if name == "scale" else pointers.get(name, "i32")
        signature[name] = "constexpr" if name in constants else kind
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if name not in constants and (name in pointers or "_stride_" in name)
    }
    source = ASTSource(
        kernel,
        signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs=attributes,
    )
    compiled = compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": num_warps, "num_stages": num_stages},
    )
    registers, spilled, machine_code = _disassemble(compiled.asm["cubin"])
    loop_spills, num_products = _read_loops(machine_code)
    return Compiled(
        compiled.asm["ptx"], registers, spilled, loop_spills, num_products, compiled.metadata.shared
    )


def _disassemble(binary: bytes) -> tuple[int, int, str]:
    """Registers, bytes of local memory, and machine code, by the tools that Triton ships."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(binary)
        usage, machine_code = (
            subprocess.run([tools / tool, option, path], check=True, capture_output=True, text=True).stdout
            for tool, option in (("cuobjdump", "--dump-resource-usage"), ("nvdisasm", "-c"))
        )
    numbers = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert numbers, usage
    return int(numbers[1]), int(numbers[2]), machine_code


def _read_loops(disassembly: str) -> tuple[int, int]:
    """Local-memory and matrix instructions inside innermost loops that hold matrix instructions."""
    lines = disassembly.splitlines()
    labels = {line.strip()[:-1]: i for i, line in enumerate(lines) if re.match(r"\s*\.L_\w+:", line)}
    loops = []
    for i, line in enumerate(lines):
        branch = re.search(r"\bBRA\b.*`\((\.L_\w+)\)", line)
        if branch and labels.get(branch[1], i) < i:
            loops.append((labels[branch[1]], i))
    spills = products = 0
    for begin, end in loops:
        if any(begin <= other[0] and other[1] <= end and other != (begin, end) for other in loops):
            continue
        body = "\n".join(lines[begin:end])
        count = len(re.findall(r"\b(?:HMMA|HGMMA)\b", body))
        if count:
            products += count
            spills += len(re.findall(r"\b(?:LDL|STL)\b", body))
    return spills, products
