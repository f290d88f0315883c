"""Runs the straight-line float32 PTX of an inline assembly block in numpy, one warp at a time."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable

import numpy as np

_ULP = 2.0**-23


def run(code: str, inputs: np.ndarray, outputs: int, error: float) -> np.ndarray:
    """Registers $0 … of a warp.

    Args:
        code: PTX with operands $i: outputs first, then inputs.
        inputs: float32 [operands, 32].
        outputs: How many operands the code writes.
        error: Relative error in units of 2⁻²³ that ex2 and rcp add to the exactly rounded result.

    Returns:
        float32 [outputs, 32].
    """
    registers: dict[str, np.ndarray] = {
        f"${outputs + i}": row.astype(np.float32) for i, row in enumerate(inputs)
    }
    statements = [s.strip() for s in re.split(r"[;\n{}]|(?<=:)\s", code) if s.strip()]
    labels = {s[:-1]: i for i, s in enumerate(statements) if s.endswith(":")}
    position = 0
    while position < len(statements):
        statement = statements[position]
        position += 1
        if statement.endswith(":") or statement.startswith(".reg"):
            continue
        if match := re.fullmatch(r"(?:@(!?)(\w+) )?bra\.uni (\w+)", statement):
            negated, predicate, label = match.groups()
            if predicate is None or bool(registers[predicate].all()) != bool(negated):
                position = labels[label]
            continue
        name, arguments = statement.split(None, 1)
        target, *sources = [a.strip() for a in arguments.split(",")]
        registers[target] = _compute(name, [_read(registers, source) for source in sources], error)
    return np.stack([registers[f"${i}"] for i in range(outputs)])


def _read(registers: dict[str, np.ndarray], operand: str) -> np.ndarray:
    if operand in registers:
        return registers[operand]
    bits = int(operand[2:], 16)
    if operand.startswith("0f"):
        return np.float32(struct.unpack("<f", struct.pack("<I", bits))[0]) * np.ones(32, np.float32)
    return np.full(32, bits, np.uint32)


def _compute(name: str, operands: list[np.ndarray], error: float) -> np.ndarray:
    kind = name.split(".")[0]
    if kind in ("setp", "vote"):
        if kind == "vote":
            return np.full(32, operands[0].all())
        a, b = (_unsigned(x) if name.endswith("u32") else x for x in operands)
        return {"ge": a >= b, "le": a <= b, "lt": a < b}[name.split(".")[1]]
    if name.endswith("u32"):
        return {"min": np.minimum, "max": np.maximum}[kind](*map(_unsigned, operands))
    if kind == "mov":
        return operands[0]
    exact: dict[str, Callable[..., np.ndarray]] = {
        "ex2": lambda x: np.exp2(x) * (1 + error * _ULP),
        "rcp": lambda x: 1 / x * (1 + error * _ULP),
        "tanh": np.tanh,
        "neg": lambda x: -x,
        "mul": lambda x, y: x * y,
        "add": lambda x, y: x + y,
        "fma": lambda x, y, z: x * y + z,
        "min": np.minimum,
    }
    with np.errstate(over="ignore", divide="ignore", invalid="ignore", under="ignore"):
        result = exact[kind](*(x.astype(np.float64) for x in operands)).astype(np.float32)
    result[np.abs(result) < 2.0**-126] = 0  # ftz
    return result


def _unsigned(x: np.ndarray) -> np.ndarray:
    return x if x.dtype == np.uint32 else x.astype(np.float32).view(np.uint32)
