"""Probes that watch a PyTorch model while it trains.

``probe = probes.attach(model, optimizer, log_dir="runs/demo")`` is the whole interface for most uses.
"""

from probes.alerts import DivergenceError, DivergenceWarning
from probes.attach import attach
from probes.failures import ProbeWarning
from probes.probe import Probe
from probes.reading import RecordedRun, RecordedSeries, read
from probes.record import Record
from probes.rng_states import load_rng_states

__all__ = [
    "DivergenceError",
    "DivergenceWarning",
    "Probe",
    "ProbeWarning",
    "Record",
    "RecordedRun",
    "RecordedSeries",
    "attach",
    "load_rng_states",
    "read",
]
