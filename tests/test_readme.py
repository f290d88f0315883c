"""The Python of README.md and docs/*.md runs, and prints what the page says it prints.

Each page is one program: its ```python blocks run in order, in one namespace and an empty directory. A
```text block right after a ```python block is its expected output, with `...` as in doctest. A block after
`<!-- no-test: reason -->` is not run. A page that begins with `<!-- needs: package, package -->` is skipped
where one of them is missing. The tutorial, which trains for a while, has test_tutorial.py.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
TUTORIAL = ROOT / "docs" / "tutorial.md"
PAGES = [ROOT / "README.md", *sorted(set((ROOT / "docs").glob("*.md")) - {TUTORIAL})]

BLOCK = re.compile(
    r"(?P<skip>^<!-- no-test: \S.*? -->\s*)?"
    r"^```python\n(?P<code>.*?)^```\n"
    r"(?:\s*^```text\n(?P<expected>.*?)^```$)?",
    re.MULTILINE | re.DOTALL,
)
NEEDS = re.compile(r"<!-- needs: (?P<packages>[\w, ]+) -->\n")


@dataclass(frozen=True)
class Block:
    line: int  # of the block's first line of code, from 1
    code: str
    expected: str | None


def runnable_blocks(page: str) -> list[Block]:
    page = page.rstrip("\n") + "\n"
    found = list(BLOCK.finditer(page))
    assert len(found) == page.count("```python"), (
        "a ```python block is indented or never closed, so it would not be tested"
    )
    return [
        Block(page.count("\n", 0, match.start("code")) + 1, match["code"], match["expected"])
        for match in found
        if not match["skip"]
    ]


def run_page(page: str, name: str) -> None:
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in runnable_blocks(page):
        stdout = io.StringIO()
        # Newlines in front give a traceback the page's own line numbers.
        code = compile("\n" * (block.line - 1) + block.code, name, "exec")
        with contextlib.redirect_stdout(stdout):
            exec(code, namespace)
        if block.expected is None:
            continue
        flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
        if not doctest.OutputChecker().check_output(block.expected, stdout.getvalue(), flags):
            pytest.fail(
                f"{name}:{block.line} should print\n{block.expected}\nbut prints\n{stdout.getvalue()}"
            )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = page.read_text(encoding="utf-8")
    if needs := NEEDS.match(text):
        for package in needs["packages"].split(", "):
            pytest.importorskip(package, reason=f"the page needs {package}")
    run_page(text, str(page.relative_to(ROOT)))


def test_readme_shows_code_and_its_output() -> None:
    blocks = runnable_blocks((ROOT / "README.md").read_text(encoding="utf-8"))
    assert any(block.expected for block in blocks)


PAGE = """
```python
x = 20
print("first", x)
```

```text
first ...
```
<!-- no-test: needs a GPU -->
```python
x = undefined
```
```console
$ not run
```
```python
print(x + 1)
```
```text
{answer}
```
"""


def test_blocks_share_a_namespace_and_match_their_output() -> None:
    assert [block.line for block in runnable_blocks(PAGE)] == [3, 18]
    run_page(PAGE.format(answer=21), "page.md")


def test_wrong_output_fails() -> None:
    with pytest.raises(pytest.fail.Exception, match=r"page\.md:18 should print\n22"):
        run_page(PAGE.format(answer=22), "page.md")


def test_untested_block_fails() -> None:
    with pytest.raises(AssertionError, match="indented"):
        runnable_blocks("* item\n  ```python\n  1 / 0\n  ```\n")
