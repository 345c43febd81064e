"""Reports, pictures and dumps of inspections that are made up: nothing is compiled here."""

import io
import json
import re
import struct
from dataclasses import replace
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from compiled_loss.inspection.network import Collective
from compiled_loss.inspection.record import (
    Break,
    Configuration,
    Graph,
    Guard,
    Inspection,
    Kernel,
    Launch,
    Measured,
    Pass,
    Saved,
)

MIB = 2**20
needs_rich = pytest.mark.skipif(find_spec("rich") is None, reason="needs the extra inspect")
needs_matplotlib = pytest.mark.skipif(find_spec("matplotlib") is None, reason="needs matplotlib")
LONG = "triton_red_fused_" + "add_mul_" * 12 + "sum_7"


def made(**changes):
    """A chunked loss with nothing to complain about."""
    chunk = (
        Launch(
            kernel="mm",
            kind="gemm",
            read_bytes=40 * MIB,
            written_bytes=8 * MIB,
            live_bytes=24 * MIB,
            operations=4 * 10**12,
            dtype="bfloat16",
            shapes="[512, 4096] @ [4096, 8192]",
        ),
        Launch(kernel=LONG, kind="reduction", read_bytes=8 * MIB, written_bytes=8 * MIB, live_bytes=25 * MIB),
    )
    end = Launch(kernel="triton_poi_fused_mul_0", kind="pointwise", read_bytes=4, written_bytes=4, live_bytes=16 * MIB)
    way = Configuration(target="cuda:sm_90", options="XBLOCK=1 warps=8", registers=41, spills=0, shared=2048)
    base = Inspection(
        name="chunked",
        device="cuda:sm_90",
        torch="2.13.0",
        triton="3.7.0",
        inputs=("bf16[2048,4096]:grad", "bf16[8192,4096]:grad", "int64[2048]:0..8191", "7"),
        forward=Pass(launches=chunk * 4, peak_bytes=25 * MIB),
        backward=Pass(launches=(end,), peak_bytes=17 * MIB),
        saved=(Saved(shape=(2048, 4096), dtype="bfloat16", size=16 * MIB, origin="mm_1 = aten.mm", location="a.py:3"),),
        kernels=(
            Kernel(name="mm", kind="gemm", source=""),
            Kernel(name=LONG, kind="reduction", source="import triton\n", configurations=(way, way)),
            Kernel(name="triton_poi_fused_mul_0", kind="pointwise", source="import triton\n# 0\n"),
        ),
        graphs=(
            Graph(direction="forward", operator="", nodes="class Forward: ...", wrapper="def call(args): ..."),
            Graph(direction="backward", operator="", nodes="class Backward: ...", wrapper="def call(args): ..."),
        ),
        breaks=(),
        guards=tuple(Guard(kind="CONSTANT_MATCH", code=f"L['x{i}'] == {i}", location="a.py:3") for i in range(20)),
        seconds=6.25,
    )
    return replace(base, **changes)


def bare():
    """Of a function that does nothing."""
    nothing = Pass(launches=(), peak_bytes=0)
    empty = {name: () for name in ("inputs", "saved", "kernels", "graphs", "breaks", "guards")}
    return made(forward=nothing, backward=None, device="cpu", triton="", **empty)


def noisy():
    """With everything that a report must be loud about; names hold what terminals and pages take for markup."""
    plain = made()
    item = Launch(kernel="_local_scalar_dense", kind="sync", read_bytes=4, written_bytes=0, live_bytes=0)
    copy = replace(item, kernel="copy_", kind="transfer")
    way = plain.kernels[1].configurations[0]
    ways = (way, replace(way, spills=48), replace(way, target="hip:gfx942", spills=16))
    logits = Saved(shape=(2048, 65536), dtype="float32", size=512 * MIB, origin="logits", location="loss.py:77")
    return replace(
        plain,
        name="noisy[red]<b>",
        forward=replace(plain.forward, launches=(*plain.forward.launches, item, item, copy)),
        saved=(*plain.saved, logits),
        breaks=(Break(reason="call to\n print [/bold]", location="user.py:12"),),
        guards=(Guard(kind="TENSOR_MATCH", code="L['x'] is [red]&[/red]", location="user.py:1"),) * 3,
        kernels=(replace(plain.kernels[1], configurations=ways), *plain.kernels[2:]),  # operators may be missing
        measured=Measured(peak_bytes=50 * MIB, seconds=0.25),
    )


def sharded(ranks=8, **changes):
    """Of a rank of many: an all-reduce of 2 MiB after each chunk, one of 64 MiB back."""
    plain = made(**changes)
    small, large = (Collective(kind="all-reduce", size=mib * MIB, ranks=ranks) for mib in (2, 64))
    send = Launch(
        kernel="all_reduce_", kind="collective", read_bytes=1, written_bytes=1, live_bytes=0, collective=small
    )
    back = (*plain.backward.launches, replace(send, collective=large))
    forward = (*plain.forward.launches[:2], send) * 4
    return replace(
        plain,
        forward=replace(plain.forward, launches=forward),
        backward=replace(plain.backward, launches=back),
    )


def whole():
    """Of a model: its loss has the second half of the launches, with attention before, and something is not known."""
    plain = made()
    attend = Launch(
        kernel="_flash",
        kind="attention",
        read_bytes=8 * MIB,
        written_bytes=2 * MIB,
        live_bytes=8 * MIB,
        scratch_bytes=MIB,
    )
    attend = replace(attend, operations=10**12, dtype="bfloat16", shapes="[2, 4, 128, 64] @ [2, 4, 128, 64]")
    own = tuple(replace(v, of_loss=True, loss_bytes=10 * MIB) for v in plain.forward.launches[4:])
    last = tuple(replace(v, scratch_bytes=32 * MIB) for v in plain.backward.launches)
    return replace(
        plain,
        forward=replace(plain.forward, launches=(attend, *plain.forward.launches[:3], *own)),
        backward=replace(plain.backward, launches=last),
        saved=(replace(plain.saved[0], of_loss=True), replace(plain.saved[0], size=48 * MIB)),
        loss=("cross_entropy", "lm_head"),
        notes=("what nobody knows",),
    )


EVERY = {"made": made(), "bare": bare(), "noisy": noisy(), "forward only": made(backward=None), "sharded": sharded()}
EVERY["whole"] = whole()


# Data ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_json_round_trip(name):
    inspection = EVERY[name]
    text = inspection.to_json()
    assert Inspection.from_json(text) == inspection
    assert set(json.loads(text)) == set(inspection.__dataclass_fields__)
    assert Inspection.from_json(text.replace('"seconds": 6.25', '"seconds": 6.5')) != inspection


# Tables -------------------------------------------------------------------------------------------------------------


def shown(*inspections, width=120, color=None, encoding="utf-8"):
    from rich.console import Console

    from compiled_loss.inspection.table import report

    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding)
    Console(file=file, width=width, color_system=color, force_terminal=color is not None, highlight=False).print(
        report(*inspections)
    )
    file.flush()
    return raw.getvalue().decode(encoding)


def row(text, name):
    """The cells of the first line that begins so."""
    line = next(line for line in text.splitlines() if line.strip().startswith(name))
    return line.strip().removeprefix(name).split()


@needs_rich
@pytest.mark.parametrize("width", [20, 80, 120])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize("names", [*([name] for name in EVERY), list(EVERY), ["made", "noisy"]])
def test_fits_every_terminal(names, width, encoding):
    text = shown(*(EVERY[name] for name in names), width=width, encoding=encoding)
    assert all(len(line) <= width for line in text.splitlines())
    assert text.count("Summary") == 1


@needs_rich
@pytest.mark.parametrize("width", [80, 120])
def test_key_figures(width):
    text = shown(made(), width=width)
    assert "chunked on cuda:sm_90" in text
    assert "torch 2.13.0, triton 3.7.0, inspected in 6.2 s" in text
    assert "bf16[8192,4096]:grad" in text
    assert row(text, "graphs") == ["2"]
    assert row(text, "launches") == ["8", "+", "1"]
    assert row(text, "kernels") == ["2", "+", "1"]
    assert row(text, "peak over inputs") == ["25.00", "MiB"]
    assert row(text, "backward") == ["17.00", "MiB"]
    assert row(text, "kept for backward") == ["16.00", "MiB"]
    assert row(text, "operations") == ["16.00", "TFLOP"]
    assert row(text, "bytes moved") == ["256.00", "MiB"]
    seconds = made().roofline_seconds("H200")
    assert row(text, "roofline on H200") == [f"{1e3 * seconds:.3f}", "ms"]
    assert "roofline on A100" not in text
    assert row(text, "mm ")[:5] == ["gemm", "4", "-", "192.00", "MiB"]
    assert re.search(r"^triton_red\S*…\S*_7 +reduction +4 +- +64.00 MiB +41 +0 +2.00 KiB +2 *$", text, re.MULTILINE)
    assert re.search(r"^mm +\[512, 4096\] @ \[4096, 8192\] +bfloat16 +4 +- +16.00 TFLOP", text, re.MULTILINE)
    assert re.search(r"^bfloat16\[2048, 4096\] 16.00 MiB mm_1 = aten.mm +a.py:3", text, re.MULTILINE)
    assert "L['x11'] == 11" in text
    assert "L['x12'] == 12" not in text
    assert "and 8 more, see --json" in text
    assert "measured" not in text
    assert "!" not in text


@needs_rich
@pytest.mark.parametrize("width", [80, 120])
def test_the_share_of_the_loss(width):
    text = shown(whole(), width=width)
    assert row(text, "loss, launches") == ["4"]
    assert row(text, "peak  ") == ["0", "B", "0%"]  # at the third launch, before the loss
    assert row(text, "kept  ") == ["16.00", "MiB", "25%"]
    assert row(text, "operations ") == ["17.00", "TFLOP"]
    assert re.search(r"^  operations +8.00 TFLOP  47% *$", text, re.MULTILINE)
    assert re.search(r"^  roofline on H100 +[\d.]+ ms  4\d% *$", text, re.MULTILINE)
    assert row(text, "at most") == ["48.00", "MiB"]  # of 16, and 32 that nobody sees
    assert "! what nobody knows" in text
    assert re.search(r"^Fused attention, its first factors *$", text, re.MULTILINE)
    assert len(re.findall(r"^_flash +\[2, 4, 128, 64\] @ \[2, 4, 128, 64\]", text, re.MULTILINE)) == 1
    for inspection in (made(), replace(whole(), loss=())):
        assert "loss, launches" not in shown(inspection, width=width)


@needs_rich
@pytest.mark.parametrize("width", [80, 120])
def test_communication(width):
    """At 450 GB/s: 14/8 of 2 MiB take 8.156 us, of 64 MiB 260.979 us; a call and its 14 steps 15.2 us."""
    text = shown(sharded(), width=width)
    assert row(text, "collectives") == ["4", "+", "1"]
    assert row(text, "sent") == ["126.00", "MiB"]  # 14/8 of 72
    assert row(text, "packed") == ["0.370", "ms"]  # 4 x 23.356 + 276.179
    assert row(text, "spread") == ["2.826", "ms"]  # 9 times the bytes' time, and 5 x (6.8 + 6 x 5.0)
    assert row(text, "all-reduce") == ["8", "2.00", "MiB", "4", "-", "14.00", "MiB", "0.093", "ms", "0.441", "ms"]
    assert re.search(r"^all-reduce +8 64.00 MiB +- +1 112.00 MiB 0.276 ms 2.386 ms *$", text, re.MULTILINE)
    assert "Collectives; NVLink at 450 GB/s, InfiniBand at 50 GB/s" in text
    unknown = shown(sharded(device="hip:gfx942"), width=width)
    assert row(unknown, "packed") == row(unknown, "spread") == ["-"]
    assert row(unknown, "all-reduce") == ["8", "2.00", "MiB", "4", "-", "14.00", "MiB", "-", "-"]
    assert "NVLink" not in unknown


@needs_rich
def test_communication_in_the_docs():
    """The page's rows are what the report makes of their kind, ranks, bytes and counts."""
    page = (Path(__file__).parents[2] / "docs" / "inspection.md").read_text(encoding="utf-8")
    documented = re.findall(r"^all-reduce +(\d+) +([\d.]+) ([KM]i|)B +(\d+|-) +(\d+|-) .*$", page, re.MULTILINE)
    assert len(documented) == 4
    launch = Launch(kernel="k", kind="collective", read_bytes=0, written_bytes=0, live_bytes=0)
    passes = ([], [])
    for ranks, number, unit, *counts in documented:
        whole = int(float(number) * {"": 1, "Ki": 1024, "Mi": MIB}[unit])
        one = replace(launch, collective=Collective(kind="all-reduce", size=whole, ranks=int(ranks)))
        for launches, count in zip(passes, counts, strict=True):
            launches += [one] * int(count.replace("-", "0"))
    forward, backward = (Pass(launches=tuple(launches), peak_bytes=0) for launches in passes)
    text = shown(made(forward=forward, backward=backward), width=100)
    for line in re.search(r"^collectives.*?(?=```)", page, re.MULTILINE | re.DOTALL)[0].splitlines():
        assert re.search(rf"^{re.escape(line)} *$", text, re.MULTILINE) or not line, line


@needs_rich
def test_no_communication_is_not_reported():
    alone = [shown(inspection) for name, inspection in EVERY.items() if name != "sharded"]
    assert not [text for text in alone if re.search("collective|packed|spread|sent", text)]
    assert made().communication_seconds() == made().sent_bytes == 0
    assert row(shown(made(), sharded()), "sent") == ["-", "126.00", "MiB"]


@needs_rich
def test_units():
    from compiled_loss.inspection.picture import size

    sizes = [0, 1, 1023, 1024, 1536 * 2**20, 3 * 2**50]
    assert [size(n) for n in sizes] == ["0 B", "1 B", "1,023 B", "1.00 KiB", "1.50 GiB", "3,145,728.00 GiB"]


@needs_rich
@pytest.mark.parametrize("width", [80, 120])
def test_what_is_wrong_is_loud(width):
    styled = shown(noisy(), width=width, color="standard")
    text = re.sub(r"\x1b\[[\d;]*m", "", styled)
    words = "".join(text.split())  # lines are folded
    red, yellow = "\x1b[1;31m! ", "\x1b[33m! "
    loud = [line for line in styled.splitlines() if line.startswith((red, yellow))]
    for color, warning in (
        (red, "graph break at user.py:12: call to print [/bold]"),
        (red, "2 x _local_scalar_dense (sync): the host waits"),
        (red, "1 x copy_ (transfer)"),
        (red, f"spills up to 16 bytes a thread in 1 of 1 configurations for hip:gfx942: {LONG}"),
        (yellow, f"spills up to 48 bytes a thread in 1 of 2 configurations for cuda:sm_90: {LONG}"),
        (yellow, "keeps 512.00 MiB, more than any input: logits loss.py:77"),
    ):
        assert f"! {warning}".replace(" ", "") in words
        assert any(line.startswith(color + warning[:40]) for line in loud), warning
    assert len(loud) == 6
    assert re.search(r"graph breaks +\x1b\[1;31m *1\x1b", styled)
    assert re.search(r"hip:gfx942 +41 +\x1b\[1;31m *16\x1b", styled)
    assert re.search(r"cuda:sm_90 +41 +0 ", styled)
    assert re.search(r"\x1b\[33m *512.00 MiB\x1b", styled)
    assert re.search(r"\x1b\[1;31msync\s*\x1b", styled)
    assert "3 x L['x'] is [red]&[/red]" in text
    assert row(text, "measured") == ["50.00", "MiB"]
    assert row(text, "prediction is off by") == ["-50.0%"]
    assert row(text, "measured time") == ["250.000", "ms"]


@needs_rich
def test_saved_tensor_as_large_as_an_input_is_no_alarm():
    inspection = made()
    (saved,) = inspection.saved
    assert "more than any input" not in shown(replace(inspection, saved=(replace(saved, size=64 * MIB),)))
    assert "more than any input" in shown(replace(inspection, saved=(replace(saved, size=64 * MIB + 1),)))


@needs_rich
def test_side_by_side():
    plateau = replace(made(), name="plateau", forward=replace(made().forward, peak_bytes=100 * MIB))
    text = shown(plateau, made(), width=80)
    assert row(text, "peak over inputs") == ["100.00", "MiB", "25.00", "MiB", "0.25"]
    assert row(text, "graph breaks") == ["0", "0"]
    assert re.search(r"^ +plateau +chunked +2nd / 1st *$", text, re.MULTILINE)
    assert "Kernels" not in text
    one_measured = [line.split()[0] for line in shown(plateau, noisy()).splitlines() if line.strip()]
    assert one_measured.index("backward") < one_measured.index("measured") < one_measured.index("kept")
    three = shown(plateau, made(), bare(), width=80)
    assert row(three, "peak over inputs") == ["100.00", "MiB", "25.00", "MiB", "0", "B"]
    assert row(three, "backward")[-1] == row(three, "roofline on H100")[-1] == "-"


@needs_rich
def test_skyline_shows_the_highest_of_each_span():
    low = Launch(kernel="k", kind="pointwise", read_bytes=0, written_bytes=0, live_bytes=1)
    launches = (low,) * 507 + (replace(low, live_bytes=32),) + (low,) * 492
    inspection = made(forward=Pass(launches=launches, peak_bytes=32), backward=Pass(launches=(low,), peak_bytes=1))
    *_, first, second, third, fourth = shown(inspection, width=80).rstrip("\n").splitlines()
    assert [line.count("█") for line in (first, second, third, fourth)] == [1, 1, 1, 1]
    assert 30 < first.index("█") < 50
    assert fourth.count("▁") == len(fourth.strip()) - 2
    assert fourth[-2:] == "|▁"


# Pictures -----------------------------------------------------------------------------------------------------------


def png_size(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert data[-8:-4] == b"IEND"
    return struct.unpack(">II", data[16:24])


@needs_rich
@needs_matplotlib
@pytest.mark.parametrize("names", [["made"], ["bare"], ["made", "noisy"], list(EVERY), []], ids=" ".join)
def test_picture(tmp_path, names):
    from compiled_loss.inspection.picture import plot

    plot([EVERY[name] for name in names], tmp_path / "memory.png")
    width, height = png_size(tmp_path / "memory.png")
    assert width > height > 500


@needs_rich
@needs_matplotlib
def test_picture_holds_what_it_says(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    from compiled_loss.inspection.picture import plot

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_args, **_keywords: figures.append(figure))
    one, cpu = made(), made(device="cpu")
    for inspections in ([one], [one, noisy()], [one, cpu]):
        plot(inspections, tmp_path / "memory.png")
    alone, timed, counted = (figure.axes[0] for figure in figures)

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
    assert [text.get_text() for text in figures[1].legends[0].get_texts()] == [
        "chunked: peak 25.00 MiB",
        "noisy[red]<b>: peak 25.00 MiB",
    ]


# Dumps --------------------------------------------------------------------------------------------------------------


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
def test_page_shows_what_is_wrong(tmp_path):
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
