"""What a report says."""

from __future__ import annotations

import math
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

from probes import incident_page
from probes.incident_page import Incident, describe, html, markdown
from probes.record import Series, StepRecords
from stability.divergence import ALL_LAYERS, Alert

ALERT = Alert(
    step=30,
    layer="blocks.2.fc1",
    quantity="grad_norm",
    severity="divergence",
    value=5300.0,
    reference=1.25,
    reason="gradient norm 5.3e+03 is 4.2e+03 × its median of 1.25.",
    kind="gradient-explosion",
    onset_step=27,
    evidence=((25, 1.2), (26, 1.3), (27, 14.0), (28, 201.0), (30, 5300.0)),
    spread=("blocks.1.fc1", "blocks.0.fc1", "embedding", "head"),
    remedies=("clip the gradient norm (1211.5063)", "longer warm-up (2309.14322)."),
)
LAYERS = ["embedding", *(f"blocks.{index}.fc1" for index in range(4)), "head"]


def incident(**changes: Any) -> Incident:
    series = (*(Series(layer, "grad_norm") for layer in reversed(LAYERS)), Series(ALL_LAYERS, "loss"))
    steps = [
        StepRecords(step, series, np.full(len(series), step + 1.0), np.full(len(series), math.nan))
        for step in range(31)
    ]
    given = Incident(
        kind="gradient-explosion",
        step=30,
        alert=ALERT,
        alerts=[ALERT],
        consequences=(),
        error=None,
        layers=LAYERS,
        steps=steps,
        environment={"torch": "2.13", "directory": "/a b", "command": "python train.py --lr 1"},
        checkpoint_step=20,
        folder="/runs/incidents/step-000030",
        files={"series.npz": "31 steps"},
    )
    return given._replace(**changes)


def test_the_sentence_says_what_where_when_the_evidence_and_the_remedies() -> None:
    assert incident().summary == (
        "Gradient explosion (divergence) began in `blocks.2.fc1` at step 27: gradient norm 5.3e+03 is "
        "4.2e+03 × its median of 1.25; grad_norm went 1.2, 1.3, 14, 201, 5300 over steps 25 to 30; it "
        "spread to `blocks.1.fc1`, `blocks.0.fc1`, `embedding` and 1 more; what usually helps: clip the "
        "gradient norm (1211.5063); longer warm-up (2309.14322)."
    )


def test_an_alert_with_the_least_there_can_be() -> None:
    alert = Alert(3, ALL_LAYERS, "loss", "warning", math.nan, None, "the loss is NaN.")
    assert describe(alert) == "loss (warning) began in the whole model at step 3: the loss is NaN"
    assert html(incident(alert=alert, steps=[], alerts=[])).endswith("</html>\n")


def test_the_title_names_a_layer_only_where_the_alert_does() -> None:
    assert markdown(incident()).startswith("# Step 30: gradient explosion in blocks.2.fc1\n")
    unknown = replace(ALERT, kind="non-finite", layer=ALL_LAYERS)
    assert markdown(incident(kind="non-finite", alert=unknown)).startswith(
        "# Step 30: non finite in the whole model\n"
    )


def test_the_end_of_a_training() -> None:
    assert incident(kind="exit", step=40).summary.startswith(
        "The training ended after step 40; gradient explosion (divergence) began in `blocks.2.fc1`"
    )
    assert incident(kind="KeyboardInterrupt", error=KeyboardInterrupt(), alert=None).summary == (
        "KeyboardInterrupt ended the training in step 30; no alert came before."
    )


@pytest.mark.parametrize("error", [None, RuntimeError("no memory")])
def test_the_end_tells_what_has_followed_since_the_alert(error: Exception | None) -> None:
    during = Alert(29, "head", "loss", "warning", 9.0, 1.0, "it rose.", kind="loss-spike")
    after = Alert(36, "blocks.3.fc1", "grad_norm", "warning", 9.0, 1.0, "it fell.", kind="vanishing-gradient")
    given = incident(kind="exit", step=40, error=error, consequences=(during, after))
    assert given.summary.endswith(" Since then: vanishing gradient in `blocks.3.fc1` at step 36.")
    page = markdown(given)
    assert "| 29 | warning | loss-spike | `head` | it rose. |" in page
    assert "| 36 | warning | vanishing-gradient | `blocks.3.fc1` | it fell. |" in page


def test_an_alert_that_stays_in_its_layer() -> None:
    page = markdown(incident(alert=replace(ALERT, spread=())))
    assert "| spread to | no other layer that a detector named |" in page


@pytest.mark.parametrize("render", [markdown, html])
def test_both_pages_hold_the_same_facts(render: Any) -> None:
    page = render(incident())
    for fact in (
        "blocks.2.fc1",
        "1211.5063",
        "201",
        "5300",
        "embedding",
        "2.13",
        "31 steps",
        "loss per weight",
    ):
        assert fact in page
    assert "cd '/a b' && python train.py --lr 1" in page.replace("&#x27;", "'").replace("&amp;", "&")
    assert "with the checkpoint of step 20 loaded and another log_dir" in page


def test_the_recipe_has_two_lines() -> None:
    assert len(incident_page._recipe(incident())) == 2
    assert "as before, with another log_dir" in incident_page._recipe(incident(checkpoint_step=0))[0]


def test_the_page_is_well_formed() -> None:
    class Checker(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.open: list[str] = []
            self.num_maps = 0

        def handle_starttag(self, tag: str, attrs: object) -> None:
            self.num_maps += tag == "image"
            if tag not in ("meta", "image", "rect", "polyline"):
                self.open.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert self.open.pop() == tag

    checker = Checker()
    hostile = ALERT.reason + ' <script>alert("x")</script> & | `'
    page = html(incident(alert=Alert(30, "a<b>", "grad_norm", "warning", 1.0, None, hostile)))
    for self_closed in ("/>",):
        page = page.replace(self_closed, ">")
    checker.feed(page)
    assert checker.open == []
    assert checker.num_maps == 1
    assert "<script" not in page


def test_it_stays_small_with_many_layers_and_steps() -> None:
    series = tuple(Series(f"blocks.{index}", "grad_norm") for index in range(400))
    values = np.random.default_rng(0).lognormal(size=(512, 400))
    steps = [StepRecords(step, series, values[step], values[step]) for step in range(512)]
    assert len(html(incident(steps=steps, alert=None))) < 200_000
