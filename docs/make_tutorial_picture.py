"""Run the tutorial and photograph its report.

    PYTHONPATH=. python docs/make_tutorial_picture.py    # about a minute on one CPU core

Prints what each block of docs/tutorial.md prints, for the page. Needs Chromium, as make_report_pictures.py.
"""

from __future__ import annotations

import contextlib
import re
import runpy
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main() -> int:
    """Run and photograph."""
    photograph = runpy.run_path(str(HERE / "make_report_pictures.py"))["photograph"]
    page = (HERE / "tutorial.md").read_text(encoding="utf-8")
    namespace = {"__name__": "__main__"}
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for block in re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
            print("----", flush=True)
            exec(block, namespace)
        photograph(Path("runs/explodes/report.html"), HERE / "images" / "tutorial_report.png", dark=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
