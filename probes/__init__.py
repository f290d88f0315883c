"""Probes that watch a PyTorch model while it trains.

``probe = probes.attach(model, optimizer, log_dir="runs/demo")`` is the whole interface for most uses.
"""

from probes.alerts import DivergenceError, DivergenceWarning
from probes.attach import attach
from probes.delivery import ProbeWarning
from probes.probe import Probe
from probes.reading import RecordedSeries, read
from probes.record import Record

__all__ = [
    "DivergenceError",
    "DivergenceWarning",
    "Probe",
    "ProbeWarning",
    "Record",
    "RecordedSeries",
    "attach",
    "read",
]
