"""Where records go. A sink writes; it decides nothing."""

from probes.sinks.jsonl import JsonLinesSink
from probes.sinks.memory import MemorySink
from probes.sinks.sink import Sink
from probes.sinks.tensorboard import TensorBoardSink

__all__ = ["JsonLinesSink", "MemorySink", "Sink", "TensorBoardSink"]
