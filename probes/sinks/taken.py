"""Which sinks that write a file an open probe has taken: one file is for one training at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from weakref import WeakSet

from probes.sinks.csv import CsvSink
from probes.sinks.jsonl import JsonLinesSink
from probes.sinks.sink import Sink
from probes.sinks.tensorboard import TensorBoardSink

# Each writes the steps of one training, in their order. A subclass may have made up its mind to do otherwise.
_FILE_SINKS = (JsonLinesSink, CsvSink, TensorBoardSink)
_taken: WeakSet[Sink] = WeakSet()  # by probes that are open


def check_sinks_are_free(sinks: Sequence[Sink]) -> None:
    """Checks that none writes a file for another open probe: steps would be mixed, and end with the first.

    Args:
        sinks: As given to `attach`; those that write no file may be shared.

    Raises:
        ValueError: One is there twice, or another open probe writes to it.
    """
    for index, sink in enumerate(sinks):
        if type(sink) in _FILE_SINKS and (sink in _taken or any(sink is one for one in sinks[:index])):
            raise ValueError(
                f"`sinks` holds a {type(sink).__name__} twice, or one that another open probe writes to. "
                "Make one with a path of its own for each, or close the other probe first."
            )


def take_sinks(sinks: Sequence[Sink]) -> Callable[[], None]:
    """Takes the files among the sinks for a probe.

    Args:
        sinks: As given to `attach`.

    Returns:
        The function that gives them back, for when the probe closes.
    """
    taken = [sink for sink in sinks if type(sink) in _FILE_SINKS]
    _taken.update(taken)
    return lambda: _taken.difference_update(taken)
