"""What a probe has recorded, for tests."""

from __future__ import annotations

import probes
from probes.record import Record


def values_of(probe: probes.Probe, quantity: str, layer: str, **fields: object) -> list[float]:
    def matches(record: Record) -> bool:
        wanted = {"head": None, "call": 0, **fields}
        return (record.quantity, record.layer) == (quantity, layer) and all(
            getattr(record, name) == value for name, value in wanted.items()
        )

    return [record.value for record in probe.records if matches(record)]
