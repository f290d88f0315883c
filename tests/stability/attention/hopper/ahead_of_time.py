"""Compiles the Hopper kernels for a GPU that is not there, with whatever Triton is found first.

    PYTHONPATH=<folder of a triton>:<repository> python -m tests.stability.attention.hopper.ahead_of_time

prints one line of JSON for each kernel of each call: registers, spills in loops, shared memory, atomics, and
operands that a loop overwrites, and whether the same call of other sizes compiles anything.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, ClassVar

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from stability.attention.hopper import sigmoid_backward, sigmoid_forward
from stability.attention.hopper.blocks import forward_blocks
from stability.attention.hopper.eligibility import installed_triton

Sizes = tuple[int, int, int]  # batch, tokens, heads
OTHER_SIZES: Sizes = (1, 77, 3)

# What a call may ask for beyond the plain one.
CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "fast": {"is_fast": True},
    "float16": {"dtype": torch.float16},
    "causal": {"is_causal": True},
    "lengths": {"lengths": True},
    "everything": {"is_causal": True, "lengths": True, "score_bias": True, "sums": True},
}


class Absent:
    """A driver that describes a Hopper GPU, keeps what it is to load, and launches nothing."""

    kept: ClassVar[list[tuple[bytes, int]]] = []
    utils = property(lambda self: self)

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return lambda *arguments, **options: None

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "max_num_regs": 65536, "multiprocessor_count": 132, "warpSize": 32}

    def load_binary(self, name: str, cubin: bytes, shared: int, device: int) -> tuple[int, ...]:
        self.kept.append((cubin, shared))
        return 1, 2, 0, 0, 1024

    def unload_module(self, *arguments: Any) -> None: ...

    def fill_tma_descriptor_tiled(self, *arguments: Any) -> int:
        return 0

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def compile_call(
    head_dim: int, name: str, is_deterministic: bool | None, sizes: Sizes = (2, 512, 2), row: int = 0
) -> list[tuple[bytes, int]]:
    """Binaries and shared memory of a forward (``is_deterministic`` None) or a backward, if it compiles.

    The biases are the ``row`` of a table, so that those of a row beyond the first may start anywhere.
    """
    batch, tokens, heads = sizes
    options = dict(CALLS[name])
    dtype = options.pop("dtype", torch.bfloat16)
    lengths = torch.full((batch,), tokens - 12) if options.pop("lengths", False) else None
    sums = options.pop("sums", False)
    query = torch.zeros(batch, tokens, heads, head_dim, dtype=dtype).transpose(1, 2)
    arguments = {
        "scale": 0.1, "bias": torch.zeros(2, batch, heads)[row], "is_causal": False,
        "key_lengths": lengths, "query_lengths": lengths,
        "score_bias": torch.zeros(2, 1, tokens)[row] if options.pop("score_bias", False) else None, **options,
    }  # fmt: skip
    Absent.kept.clear()
    if is_deterministic is None:
        sigmoid_forward.forward(query, query, query, **arguments)
    else:
        sigmoid_backward.backward(
            query, query, query, query, **arguments,
            is_deterministic=is_deterministic, needs_bias_grad=sums, needs_score_bias_grad=sums,
        )  # fmt: skip
    return list(Absent.kept)


def measure(cubin: bytes) -> dict[str, int]:
    """Registers of a thread, atomics, and accesses to local memory in the innermost loops that multiply."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
        text = subprocess.run([tool, "-c", path], check=True, capture_output=True, text=True).stdout
    labels: dict[str, int] = {}
    code: list[str] = []
    for line in text.splitlines():
        if match := re.match(r"(\.L_x_\d+):", line.strip()):
            labels[match[1]] = len(code)
        elif match := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            code.append(match[1])
    jumps = [(m[1], i) for i, line in enumerate(code) if (m := re.search(r"BRA.*(\.L_x_\d+)", line))]
    loops = [(labels[label], i) for label, i in jumps if labels.get(label, i + 1) <= i]
    loops = [(a, b) for a, b in loops if any("HGMMA" in line for line in code[a:b])]
    inner = [(a, b) for a, b in loops if not any((c, d) != (a, b) and a <= c and d <= b for c, d in loops)]
    spills = [sum("LDL" in line or "STL" in line for line in code[a:b]) for a, b in inner]
    registers = max(int(number) for line in code for number in re.findall(r"\bR(\d+)\b", line)) + 1
    return {
        "registers": registers,
        "loops": len(inner),
        "loop_spills": max(spills, default=0),
        "atomics": sum("ATOMG" in line for line in code),
        "overwritten_operands": max((num_overwritten_operands(code[a:b]) for a, b in inner), default=0),
    }


def num_overwritten_operands(loop: list[str]) -> int:
    """Registers that a loop multiplies by as they come in, and then writes other things to.

    What a kernel holds in registers across the loop must not change there, and ptxas 12.8 has given such
    registers to the slopes of the same loop: every block after the first was multiplied by the wrong matrix.
    """
    held: set[int] = set()
    written: set[int] = set()
    for line in loop:
        instruction = re.sub(r"^@!?U?P\d+\s+", "", line)
        if match := re.match(r"HGMMA\S*\s+R\d+, R(\d+), gdesc", instruction):
            held |= set(range(int(match[1]), int(match[1]) + 4)) - written
        elif match := re.match(r"\S+\s+R(\d+)\b", instruction):
            width = 4 if instruction.startswith("LDSM") else 1
            written |= set(range(int(match[1]), int(match[1]) + width))
    return len(held & written)


def num_handed_on(head_dim: int, name: str) -> int:
    """Registers that a pass of a forward loop hands on to the next: packed weights, [64, keys] of a block."""
    options = CALLS[name]
    return forward_blocks(head_dim, options.get("is_causal", False), "score_bias" in options).keys // 4


def main() -> None:
    driver.set_active(Absent())
    sigmoid_forward.multiprocessors = lambda device: 132
    for head_dim in (64, 128):
        for name in CALLS:
            for is_deterministic in (None, False, True):
                compiled = compile_call(head_dim, name, is_deterministic)
                more = compile_call(head_dim, name, is_deterministic, OTHER_SIZES, row=1)
                for cubin, shared in compiled:
                    direction = "forward" if is_deterministic is None else "backward"
                    label = f"{direction}{', deterministic' * bool(is_deterministic)}, {name}, {head_dim}"
                    handed_on = num_handed_on(head_dim, name) if is_deterministic is None else 0
                    measured = {"shared": shared, **measure(cubin), "handed_on": handed_on, "more": len(more)}
                    print(json.dumps({"kernel": label, "triton": installed_triton(), **measured}), flush=True)


if __name__ == "__main__":
    main()
