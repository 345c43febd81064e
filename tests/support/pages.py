"""The README and the site's pages, and the blocks of code in them."""

import contextlib
import io
import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md")))
FENCE = re.compile(r"^```([^\n`]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


class Block(NamedTuple):
    """A block of code: its language, its text, the line it begins at, and what the page says that it prints."""

    language: str
    text: str
    line: int
    output: str | None


def read(page):
    return (ROOT / page).read_text(encoding="utf-8")


FILES = "docs/inspection.md"  # its blocks are files, each for a process of its own
FRAMEWORKS = "docs/integrations.md"  # its blocks need what `make test` installs, and a user may not have
WITH_PYTHON = [page for page in PAGES if page not in (FILES, FRAMEWORKS) and "```python" in read(page)]


def blocks(text):
    """Each block. A block of `text` right below a block of Python is what that prints."""
    found = list(FENCE.finditer(text))
    for i, block in enumerate(found):
        below = found[i + 1] if i + 1 < len(found) else None
        printed = below is not None and (block[1], below[1]) == ("python", "text")
        adjacent = printed and not text[block.end() : below.start()].strip()
        yield Block(block[1], block[2], text[: block.start(2)].count("\n"), below[2] if adjacent else None)


def run(text, name):
    """Run the blocks of a page one after the other, as a reader would type them."""
    names = {"__name__": "page"}
    for block in blocks(text):
        if block.language == "python":
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile("\n" * block.line + block.text, str(ROOT / name), "exec"), names)  # lines as in the file
            assert block.output in (None, out.getvalue()), f"{name}:{block.line}: prints\n{out.getvalue()}"


def commands(text):
    """The arguments of each `compiled-loss` in a page's blocks of shell, as one line."""
    for block in blocks(text):
        if block.language == "shell":
            for line in block.text.replace("\\\n", " ").splitlines():
                if line.startswith("compiled-loss "):
                    yield line.partition("#")[0].removeprefix("compiled-loss ")
