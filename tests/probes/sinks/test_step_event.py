"""Events written byte by byte, read by the protocol buffers' own parser."""

from __future__ import annotations

import math

import numpy as np
import pytest

from probes.sinks.step_event import StepEvent, is_image, step_of_scalars


@pytest.mark.parametrize("step", [0, 127, 128, 300, 2**40])
def test_the_parser_reads_what_was_put_in(step: int) -> None:
    from tensorboard.compat.proto.event_pb2 import Event

    tags = ["grad_norm/(all)", "σ/" + "long." * 60, "x"]
    event = StepEvent(tags)
    for values in ([1.5, -2.0, 1e-45], [math.inf, -math.inf, 1e300]):
        parsed = Event.FromString(event.serialised(12.25, step, np.array(values)))
        assert (parsed.wall_time, parsed.step) == (12.25, step)
        assert [value.tag for value in parsed.summary.value] == tags
        with np.errstate(over="ignore"):
            assert [value.simple_value for value in parsed.summary.value] == np.float32(values).tolist()


def test_not_a_number_stays_one() -> None:
    from tensorboard.compat.proto.event_pb2 import Event

    (value,) = Event.FromString(StepEvent(["a"]).serialised(0.0, 1, np.array([math.nan]))).summary.value
    assert math.isnan(value.simple_value)


@pytest.mark.parametrize("step", [0, 1, 300])
def test_what_tensorboards_own_writers_serialise_is_told_apart(step: int) -> None:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from torch.utils.tensorboard.summary import scalar, text

    image = Summary(value=[Summary.Value(tag="picture", image=Summary.Image(encoded_image_string=b"png"))])
    told = []
    for summary in (image, scalar("loss", 1.0), text("note", "words")):
        event = memoryview(Event(wall_time=1.0, step=step, summary=summary).SerializeToString())
        told.append((is_image(event), step_of_scalars(event)))
    assert told == [(True, None), (False, step), (False, None)]


def test_more_values_come_after_the_scalars() -> None:
    from tensorboard.compat.proto.event_pb2 import Event
    from torch.utils.tensorboard.summary import text

    more = text("note", "words").SerializeToString()
    event = StepEvent(["a"]).serialised(0.0, 1, np.ones(1), more)
    assert [value.tag for value in Event.FromString(event).summary.value] == ["a", "note/text_summary"]


def test_kinds_of_events_are_told_apart() -> None:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from torch.utils.tensorboard.summary import text

    picture = Summary(value=[Summary.Value(tag="p", image=Summary.Image(encoded_image_string=b"x"))])
    told = text("alerts", "it fell")
    told.value.add(tag="alert/a", simple_value=1.0)
    events = {
        "scalars": StepEvent(["a" * 200]).serialised(0.0, 300, np.ones(1)),
        "picture": Event(wall_time=1.0, step=7, summary=picture).SerializeToString(),
        "text": Event(wall_time=1.0, step=7, summary=told).SerializeToString(),
        "version": Event(wall_time=1.0, file_version="brain.Event:2").SerializeToString(),
        "empty": b"",
        "cut": StepEvent(["a"]).serialised(0.0, 300, np.ones(1))[:12],
    }
    steps = {name: step_of_scalars(memoryview(event)) for name, event in events.items()}
    assert {name for name, step in steps.items() if step is not None} == {"scalars"}
    assert steps["scalars"] == 300
    assert {name for name, event in events.items() if is_image(memoryview(event))} == {"picture"}
