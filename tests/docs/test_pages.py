"""Every block of code of the README and the site runs, and prints what the page says."""

import re
import shlex
import subprocess
import sys

import pages
import pytest

from compiled_loss.cli import make_parser

LANGUAGES = {"", "text", "python", "shell", "diff", "yaml"}  # the first two are what something prints
DIRECTIVES = {"{toctree}", "{include} ../README.md", "{eval-rst}"}


@pytest.mark.parametrize("page", pages.WITH_PYTHON)
def test_blocks_run(page):
    pages.run(pages.read(page), page)


@pytest.mark.filterwarnings("ignore")  # the frameworks' own
def test_blocks_of_frameworks_run():
    for framework in ("lightning", "transformers", "trl"):
        pytest.importorskip(framework)
    pages.run(pages.read(pages.FRAMEWORKS), pages.FRAMEWORKS)


@pytest.mark.parametrize("page", pages.PAGES)
def test_no_block_of_another_kind(page):
    assert {block.language for block in pages.blocks(pages.read(page))} <= LANGUAGES | DIRECTIVES


def test_a_wrong_page_fails():
    pages.run("```python\nx = 1\n```\n\nand\n\n```python\nprint(x)\n```\n\n```text\n1\n```\n", "page")
    with pytest.raises(AssertionError, match="page:1: prints"):
        pages.run("```python\nprint(1)\n```\n\n```text\n2\n```\n", "page")
    with pytest.raises(NameError):
        pages.run("```python\nnowhere()\n```\n", "page")


def test_commands_have_the_options_that_pages_show():
    found = [command for page in pages.PAGES for command in pages.commands(pages.read(page))]
    assert len(found) >= 8
    for command in found:
        make_parser().parse_args(shlex.split(command))


@pytest.fixture
def folder(tmp_path):
    """The files that the page on inspection consists of."""
    for block in pages.blocks(pages.read(pages.FILES)):
        if block.language == "python" and block.text.startswith("# "):
            (tmp_path / block.text.split()[1]).write_text(block.text)
    return tmp_path


def succeed(folder, *command):
    child = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stdout + child.stderr


@pytest.mark.slow
@pytest.mark.xdist_group("inspection")
@pytest.mark.parametrize("command", list(pages.commands(pages.read(pages.FILES))))
def test_inspections_run(folder, command):
    succeed(folder, sys.executable, "-m", "compiled_loss.cli", *shlex.split(command))


@pytest.mark.slow
@pytest.mark.xdist_group("inspection")
def test_inspections_from_python(folder):
    (last,) = [
        b.text for b in pages.blocks(pages.read(pages.FILES)) if b.language == "python" and not b.text.startswith("# ")
    ]
    succeed(folder, sys.executable, "-c", last)
    succeed(folder, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_losses.py")


def test_every_finding_is_on_its_page():
    page = pages.read("docs/findings.md")
    listed = re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)
    assert sorted(listed) == sorted(path.stem for path in (pages.ROOT / "findings").glob("*.sh"))
