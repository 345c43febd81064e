"""The API's pages hold what is public, and their references lead somewhere."""

import importlib
import importlib.util
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import compiled_loss

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "docs.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("docs_tool", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.xdist_group("docs")
def test_api_pages(tool, tmp_path):
    """Written in a process of their own, where a warning is an error. Each public name, no more, and nothing raw."""
    run = subprocess.run([sys.executable, TOOL, tmp_path], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    modules = [v.__name__ for v in (getattr(compiled_loss, n) for n in compiled_loss.__all__) if inspect.ismodule(v)]
    assert {*modules, *(f"compiled_loss{n}" for n in ("", ".testing", ".inspection", ".reference"))} <= set(tool.PAGES)
    for name in tool.PAGES:
        module = importlib.import_module(name)
        html = tool.Html((tmp_path / f"{name.replace('.', '/')}.html").read_text(encoding="utf-8"))
        shown = {i for i in html.ids if hasattr(module, i) and not inspect.ismodule(getattr(module, i))}
        own = {n for n, v in vars(module).items() if getattr(v, "__module__", None) == name and not n.startswith("_")}
        public = set(getattr(module, "__all__", own))
        assert shown == {n for n in public if not inspect.ismodule(getattr(module, n))}
        assert len(shown) >= 2
        assert not re.search(r":(func|class):", "".join(html.prose))
    assert "compiled_loss.html" in (tmp_path / "index.html").read_text()
    assert (tmp_path / "search.js").stat().st_size


PAGE = '<main id="here"><code>{}</code><a href="{}">x</a>{}</main>'


@pytest.mark.xdist_group("docs")
@pytest.mark.parametrize(
    ("page", "said"),
    [
        (PAGE.format("other", "b/c.html#there", "<pre>:func:`x`</pre>"), []),
        (PAGE.format("f()", "#here", ""), ["a.html: :func:`f` is on no page"]),
        (PAGE.format("C", "https://x.org/y.html", ""), ["a.html: :class:`C` is on no page"]),
        (PAGE.format("", "#nowhere", ""), ["a.html: #nowhere leads nowhere"]),
        (PAGE.format("", "b/d.html", ""), ["a.html: b/d.html leads nowhere"]),
        (PAGE.format("", "b/c.html#here", ""), ["a.html: b/c.html#here leads nowhere"]),
        (PAGE.format("", "", "see :func:`x`"), ["a.html: :func:` is not understood"]),
    ],
)
def test_broken_references_are_found(tool, page, said):
    files = {"a.html": page, "b/c.html": '<p id="there"></p><a href="../a.html#here">a</a>'}
    assert tool.broken(files, {"a.html": {("func", "f"), ("class", "C")}}) == said


@pytest.mark.xdist_group("docs")
def test_missing_note_error(tool):
    module = "compiled_loss.functional.distillation"
    assert "Hinton" in tool.note("Divergences", module)
    with pytest.raises(SystemExit, match=r"^the note 'Nowhere' is cited"):
        tool.note("Nowhere", module)
