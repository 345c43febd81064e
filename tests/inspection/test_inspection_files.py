"""Pictures and dumps of inspections that are made up: nothing is compiled here."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from importlib.util import find_spec
from urllib.parse import unquote, urlsplit

import pytest
from inspecting import png_size
from made_inspections import EVERY, LONG, made, noisy

from compiled_loss.inspection.record import Inspection, Kernel

needs_rich = pytest.mark.skipif(find_spec("rich") is None, reason="needs the extra inspect")
needs_matplotlib = pytest.mark.skipif(find_spec("matplotlib") is None, reason="needs matplotlib")


@needs_rich
@needs_matplotlib
@pytest.mark.parametrize("names", [["made"], ["bare"], ["made", "noisy"], list(EVERY), []], ids=" ".join)
def test_picture(tmp_path, names):
    from compiled_loss.inspection.picture import plot

    plot([EVERY[name] for name in names], tmp_path / "memory.png")
    for name in ("memory.png", "memory-dark.png"):
        width, height = png_size(tmp_path / name)
        assert width > height > 500


@needs_rich
@needs_matplotlib
def test_picture_contents(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    from compiled_loss.inspection.picture import plot

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_args, **_keywords: figures.append(figure))
    one, cpu = made(), made(device="cpu")
    for inspections in ([one], [one, noisy()], [one, cpu]):
        plot(inspections, tmp_path / "memory.png")
    alone, timed, counted = (figure.axes[0] for figure in figures[::2])  # each is drawn for light and for dark

    line = alone.patches[-1].get_data()
    assert list(line.values) == [24, 25] * 4 + [16]
    assert list(line.edges) == list(range(10))
    assert alone.lines[0].get_xdata()[0] == 8  # where backward begins
    assert list(alone.collections[0].get_positions()) == [0.5, 2.5, 4.5, 6.5]
    assert alone.collections[0].get_lineoffset() < 0
    assert [alone.get_xlabel(), alone.get_ylabel()] == ["launches", "memory (MiB)"]

    assert timed.get_xlabel() == "fraction of each one's roofline time on H100"
    assert counted.get_xlabel() == "fraction of each one's launches"
    assert {patch.get_data().edges[-1] for patch in (*timed.patches, *counted.patches)} == {1.0}
    share = made().forward.launches[0].seconds
    from compiled_loss.inspection.targets import GPUS

    assert timed.patches[1].get_data().edges[1] == pytest.approx(share(GPUS["H100"]) / one.roofline_seconds("H100"))
    assert [text.get_text() for text in figures[2].legends[0].get_texts()] == [
        "chunked: peak 25.00 MiB",
        "noisy[red]<b>: peak 25.00 MiB",
    ]


class Page(HTMLParser):
    """Links and text of a page, which must close what it opens."""

    def __init__(self, text):
        super().__init__()
        self.links, self.text, self._open = [], "", []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag, attributes):
        self.links += [unquote(urlsplit(value).path) for name, value in attributes if name == "href"]
        if tag != "meta":
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data


@needs_rich
@pytest.mark.parametrize("name", EVERY)
def test_index_links_to_everything(tmp_path, name):
    from compiled_loss.inspection.dump import dump

    assembly = tmp_path / "assembly" / "cuda-sm_90"
    assembly.mkdir(parents=True)
    for suffix in ("ptx", "cubin", "amdgcn", "hsaco"):
        (assembly / f"mul#2-0.{suffix}").write_bytes(b"\x00")
    (assembly / "notes.txt").write_text("not ours")
    dump(EVERY[name], tmp_path)
    page = Page((tmp_path / "index.html").read_text(encoding="utf-8"))
    files = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert files - set(page.links) == {"index.html", "assembly/cuda-sm_90/notes.txt"}
    assert set(page.links) <= files
    assert EVERY[name].name in page.text
    assert "peak over inputs" in page.text
    assert Inspection.from_json((tmp_path / "report.json").read_text(encoding="utf-8")) == EVERY[name]


@needs_rich
def test_dump_holds_graphs_and_sources(tmp_path):
    from compiled_loss.inspection.dump import dump

    inspection = made()
    inner = replace(inspection.graphs[0], operator="lib::chunk/..")
    dump(replace(inspection, graphs=(*inspection.graphs, inner)), tmp_path)
    graphs = {path.name: path.read_text() for path in (tmp_path / "graphs").iterdir()}
    assert graphs == {
        "00-forward.py": "class Forward: ...",
        "00-forward-wrapper.py": "def call(args): ...",
        "01-backward.py": "class Backward: ...",
        "01-backward-wrapper.py": "def call(args): ...",
        "02-forward-in-lib_chunk_.py": "class Forward: ...",
        "02-forward-in-lib_chunk_-wrapper.py": "def call(args): ...",
    }
    assert (tmp_path / "kernels" / "triton_poi_fused_mul_0.py").read_text() == "import triton\n# 0\n"
    page = Page((tmp_path / "index.html").read_text(encoding="utf-8"))
    assert page.links.count("kernels/triton_poi_fused_mul_0.py") == 2  # in the table and among the files
    assert LONG in page.text


@needs_rich
def test_warnings_of_the_page(tmp_path):
    from compiled_loss.inspection.dump import dump

    dump(noisy(), tmp_path)
    text = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert '<p class="alarm">! graph break at user.py:12' in text
    assert '<p class="warning">! keeps 512.00 MiB' in text
    assert '<td class="number alarm">16</td>' in text
    assert "noisy[red]&lt;b&gt;" in text
    assert "<b>" not in text


@needs_rich
def test_file_names_are_safe_unique_and_short(tmp_path):
    from compiled_loss.inspection.dump import dump

    names = ["a b", "a/b", "a#b", "A b", "../../up", ".hidden", "ü", "x" * 300, "x" * 301, "cpp"]
    sources = {name: f"# {name}" for name in names} | {"cpp": '#include "header.h"\nvoid kernel() {}'}
    dump(made(kernels=tuple(Kernel(name=n, kind="other", source=s) for n, s in sources.items())), tmp_path)
    files = list((tmp_path / "kernels").iterdir())
    assert sorted(path.read_text(encoding="utf-8") for path in files) == sorted(sources.values())
    assert len({path.name.lower() for path in files}) == len(names)
    assert all(re.fullmatch(r"\w[\w-]{0,115}\.(py|cpp)", path.name, re.ASCII) for path in files)
    assert [path.name for path in files if path.suffix == ".cpp"] == ["cpp.cpp"]
    assert {path.name for path in tmp_path.iterdir()} == {"graphs", "kernels", "report.json", "index.html"}
