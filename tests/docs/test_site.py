"""The site is built without a warning, holds what is public, and works in a browser."""

import functools
import http.server
import importlib
import inspect
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

pytest.importorskip("furo")

ROOT = Path(__file__).parents[2]
FURTHER = ("nn", "huggingface", "integrations.transformers", "testing", "inspection", "reference")
MODULES = ("compiled_loss", *(f"compiled_loss.{name}" for name in FURTHER))
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.xdist_group("docs")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="THE SITE IS NOT SEEN: there is no Chromium")


def build(source, output):
    """What Sphinx says of a source, with the project's configuration; a warning is an error."""
    flags = ("--quiet", "--fail-on-warning", "--keep-going", "--conf-dir", ROOT / "docs")
    command = [sys.executable, "-m", "sphinx", *flags, source, output]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return child.returncode, child.stderr


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    code, said = build(ROOT / "docs", folder)
    assert code == 0, said
    return folder


def names_of(site):
    """Each Python object on the site's pages."""
    from sphinx.util.inventory import InventoryFile

    found = InventoryFile.loads((site / "objects.inv").read_bytes(), uri="").data
    return {name for kind, items in found.items() if kind.startswith("py:") and kind != "py:module" for name in items}


@pytest.mark.parametrize("module", MODULES)
def test_everything_public_is_documented(site, module):
    value = importlib.import_module(module)
    own = {n for n, v in vars(value).items() if getattr(v, "__module__", None) == module and not n.startswith("_")}
    public = {n for n in getattr(value, "__all__", own) if not inspect.ismodule(getattr(value, n))}
    shown = {name.rpartition(".")[2] for name in names_of(site) if name.rpartition(".")[0] == module}
    assert {name for name in shown if hasattr(value, name)} == public
    assert len(public) >= 2


def test_wrong_sources_are_refused(tmp_path):
    """A name that is on no page, a link to no page, a docstring that is not understood."""
    wrong = ["# Wrong", "", "[x](nowhere.md)", "", "```{eval-rst}", ":func:`compiled_loss.nowhere`", "", "* *x", "```"]
    (tmp_path / "index.md").write_text("\n".join(wrong))
    code, said = build(tmp_path, tmp_path / "html")
    assert code != 0
    for warning in ("compiled_loss.nowhere", "'nowhere.md' [myst.xref_missing]", "Inline emphasis"):
        assert warning in said


def test_pages_have_a_picture_for_light_and_one_for_dark(site):
    pages = "".join(path.read_text() for path in site.glob("*.html"))
    shown = re.findall(r'class="only-(light|dark)" src="_images/([\w-]+)\.png"', pages)
    assert sorted(name for _, name in shown) == sorted(path.stem for path in (ROOT / "docs").glob("*.png"))
    assert {(theme, name.endswith("-dark")) for theme, name in shown} == {("light", False), ("dark", True)}


# In a browser -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def address(site):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=site)
    handler.log_message = lambda *_arguments: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def browse(page, *flags, dark=False):
    """The document as it is once scripts have run, and what they wrote to the console."""
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    window = ("--headless", "--no-sandbox", "--disable-gpu", "--window-size=1200,900", "--virtual-time-budget=5000")
    command = [CHROMIUM, *window, scheme, "--enable-logging=stderr", *flags, page]
    child = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    return child.stdout, re.findall(r'CONSOLE[^"]*"(.*)", source', child.stderr)


@needs_browser
@pytest.mark.parametrize("page", ["index.html", "quickstart.html", "api/cross-entropy.html"])
def test_pages_load(address, page):
    document, console = browse(f"{address}/{page}", "--dump-dom")
    assert "<h1>" in document
    assert not console


@needs_browser
def test_search(address):
    document, console = browse(f"{address}/search.html?q=linear_cross_entropy", "--dump-dom")
    first = re.search(r'<ul[^>]*class="search".*?<li.*?href="([^"]+)"', document, re.DOTALL)
    assert first[1] == "api/cross-entropy.html#compiled_loss.linear_cross_entropy"
    assert not console


@needs_browser
def test_errors_of_scripts_are_seen(tmp_path):
    (tmp_path / "broken.html").write_text("<h1>x</h1><script>nowhere()</script>")
    _, console = browse((tmp_path / "broken.html").as_uri(), "--dump-dom")
    assert len(console) == 1 and "nowhere is not defined" in console[0]


@needs_browser
def test_light_and_dark(address, tmp_path):
    """A page and the pictures on it: in the dark, hardly a pixel is as bright as paper."""
    image = pytest.importorskip("PIL.Image")
    corners, bright = [], []
    for dark in (False, True):
        browse(f"{address}/scaling.html", f"--screenshot={tmp_path / 'page.png'}", dark=dark)
        page = image.open(tmp_path / "page.png").convert("L")
        corners.append(page.getpixel((600, 20)))
        bright.append(sum(page.histogram()[200:]) / (page.width * page.height))
    assert corners[0] > 200 and corners[1] < 60
    assert bright[0] > 0.7 and bright[1] < 0.05
