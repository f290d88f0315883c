"""Where records go. A sink writes; it decides nothing."""

from probes.sinks.console import ConsoleSink
from probes.sinks.csv import CsvSink
from probes.sinks.jsonl import JsonLinesSink
from probes.sinks.memory import MemorySink
from probes.sinks.mlflow import MLflowSink
from probes.sinks.sink import Sink
from probes.sinks.tensorboard import TensorBoardSink
from probes.sinks.wandb import WandbSink

__all__ = [
    "ConsoleSink",
    "CsvSink",
    "JsonLinesSink",
    "MLflowSink",
    "MemorySink",
    "Sink",
    "TensorBoardSink",
    "WandbSink",
]
