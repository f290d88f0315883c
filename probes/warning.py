"""The one warning for what goes wrong inside a probe."""

from __future__ import annotations


class ProbeWarning(UserWarning):
    """Something could not be measured or written; the training goes on without it."""
