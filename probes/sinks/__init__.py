"""Where records go. A sink writes; it decides nothing."""

from probes.sinks.console import ConsoleSink
from probes.sinks.jsonl import JsonLinesSink
from probes.sinks.memory import MemorySink
from probes.sinks.sink import Sink
from probes.sinks.tensorboard import TensorBoardSink

__all__ = ["ConsoleSink", "JsonLinesSink", "MemorySink", "Sink", "TensorBoardSink"]
