"""Every block of code of the README and the site runs, and prints what the page says."""

import contextlib
import io
import shlex
import subprocess
import sys

import pages
import pytest

from compiled_loss.cli import make_parser

FILES = "docs/inspection.md"  # its blocks are files, each for a process of its own
WITH_PYTHON = [page for page in pages.PAGES if page != FILES and "```python" in pages.read(page)]
LANGUAGES = {"", "text", "python", "shell", "diff"}  # the first two are what something prints
DIRECTIVES = {"{toctree}", "{include} ../README.md", "{eval-rst}"}


def run(text, name):
    """Run the blocks of a page one after the other, as a reader would type them."""
    names = {"__name__": "page"}
    for block in pages.blocks(text):
        if block.language == "python":
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(
                    compile("\n" * block.line + block.text, str(pages.ROOT / name), "exec"), names
                )  # lines as in the file
            assert block.output in (None, out.getvalue()), f"{name}:{block.line}: prints\n{out.getvalue()}"


@pytest.mark.parametrize("page", WITH_PYTHON)
def test_blocks_run(page):
    run(pages.read(page), page)


@pytest.mark.parametrize("page", pages.PAGES)
def test_no_block_of_another_kind(page):
    assert {block.language for block in pages.blocks(pages.read(page))} <= LANGUAGES | DIRECTIVES


def test_a_wrong_page_fails():
    run("```python\nx = 1\n```\n\nand\n\n```python\nprint(x)\n```\n\n```text\n1\n```\n", "page")
    with pytest.raises(AssertionError, match="page:1: prints"):
        run("```python\nprint(1)\n```\n\n```text\n2\n```\n", "page")
    with pytest.raises(NameError):
        run("```python\nnowhere()\n```\n", "page")


def test_commands_have_the_options_that_pages_show():
    found = [command for page in pages.PAGES for command in pages.commands(pages.read(page))]
    assert len(found) >= 8
    for command in found:
        make_parser().parse_args(shlex.split(command))


@pytest.fixture
def folder(tmp_path):
    """The files that the page on inspection consists of."""
    for block in pages.blocks(pages.read(FILES)):
        if block.language == "python" and block.text.startswith("# "):
            (tmp_path / block.text.split()[1]).write_text(block.text)
    return tmp_path


def succeed(folder, *command):
    child = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stdout + child.stderr


@pytest.mark.slow
@pytest.mark.xdist_group("inspection")
@pytest.mark.parametrize("command", list(pages.commands(pages.read(FILES))))
def test_inspections_run(folder, command):
    succeed(folder, sys.executable, "-m", "compiled_loss.cli", *shlex.split(command))


@pytest.mark.slow
@pytest.mark.xdist_group("inspection")
def test_inspections_from_python(folder):
    (last,) = [
        b.text for b in pages.blocks(pages.read(FILES)) if b.language == "python" and not b.text.startswith("# ")
    ]
    succeed(folder, sys.executable, "-c", last)
    succeed(folder, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_losses.py")
