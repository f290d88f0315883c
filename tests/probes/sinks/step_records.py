"""A step of records and an alert on it, as sinks are given them."""

from __future__ import annotations

import math

import numpy as np

from probes.record import ALL_LAYERS, Series, StepRecords
from stability.divergence import Alert

RECORDS = {
    Series("blocks.0", "grad_norm"): 0.1,
    Series(ALL_LAYERS, "loss"): math.inf,
    Series("blocks.1", "attention/entropy", kind="estimate"): 2.5,
    Series("blocks.1", "attention/entropy", head=1, kind="estimate"): 2.25,
    Series("blocks.1", "activation_rms"): 1.5,
    Series("blocks.1", "activation_rms", call=2): math.nan,
}
STANDARD_ERRORS = [math.nan, math.nan, 0.25, 0.5, math.nan, math.nan]

DIVERGENCE = Alert(
    7,
    "blocks.0",
    "grad_norm",
    "divergence",
    9.0,
    0.1,
    'its gradient, "norm 9", grew',
    kind="gradient-explosion",
    remedies=("clip the gradient",),
)


def step_records(step: int) -> StepRecords:
    return StepRecords(step, tuple(RECORDS), np.array([*RECORDS.values()]), np.array(STANDARD_ERRORS))
