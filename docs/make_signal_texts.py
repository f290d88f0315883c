"""Write what code decides into the pages of docs/signals: thresholds and remedies.

    PYTHONPATH=. python docs/make_signal_texts.py

A page says which detectors read its signal, between two comments:

    <!-- alarms: logit_growth_detector large_logit_detector -->
    ...
    <!-- end of alarms -->

This program writes what stands between them, from the detectors' default arguments and
`stability.divergence.REMEDIES`. A test fails when a page is not up to date.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stability import divergence

SIGNALS = Path(__file__).parent / "signals"
BLOCK = re.compile(r"(<!-- alarms: (?P<names>[\w ]+) -->\n).*?(<!-- end of alarms -->)", re.DOTALL)
ARXIV = re.compile(r"\b(\d{4}\.\d{4,5})\b")

KINDS = {
    "FrozenLayerDetector": ("frozen-layer",),
    "GradientExplosionDetector": ("gradient-explosion",),
    "InitialisationDetector": ("initialisation",),
    "LossDetector": ("loss-spike",),
    "NonFiniteDetector": ("non-finite",),
    "VanishingGradientDetector": ("dead-layer", "vanishing-gradient"),
    "WeightJumpDetector": ("weight-jump",),
    "dense_coupling_detector": ("dense-coupling",),
    "entropy_collapse_detector": ("entropy-collapse",),
    "jacobian_growth_detector": ("jacobian-growth",),
    "large_logit_detector": ("logit-growth",),
    "logit_growth_detector": ("logit-growth",),
    "row_sum_growth_detector": ("row-sum-growth",),
    "saturation_detector": ("saturation",),
    "update_ratio_detector": ("update-ratio",),
    "update_rms_detector": ("update-rms",),
}
"""Of which kind a detector's alerts are."""


def thresholds(detector: Callable[..., Any]) -> str:
    """The default arguments that are numbers, as `name 1.5`."""
    parameters = inspect.signature(detector).parameters.values()
    return ", ".join(
        f"{parameter.name} {parameter.default:g}"
        for parameter in parameters
        if isinstance(parameter.default, int | float)
    )


def alarms(names: list[str]) -> str:
    """The thresholds of detectors, and what helps against what they tell of, in Markdown."""
    lines = ["| detector | kind of alert | thresholds |", "|---|---|---|"]
    for name in names:
        kinds = ", ".join(KINDS[name])
        lines.append(f"| `{name}` | {kinds} | {thresholds(getattr(divergence, name))} |")
    lines += ["", "**What helps**, the likeliest first:", ""]
    kinds_of_page = dict.fromkeys(kind for name in names for kind in KINDS[name])
    for remedy in dict.fromkeys(remedy for kind in kinds_of_page for remedy in divergence.REMEDIES[kind]):
        lines.append("* " + ARXIV.sub(r"[\1](https://arxiv.org/abs/\1)", remedy))
    return "\n".join(lines) + "\n"


def up_to_date(page: str) -> str:
    """A page with its alarms written anew."""
    return BLOCK.sub(lambda match: match[1] + "\n" + alarms(match["names"].split()) + "\n" + match[3], page)


def main() -> int:
    """Writes all pages."""
    for path in sorted(SIGNALS.glob("*.md")):
        path.write_text(up_to_date(path.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
