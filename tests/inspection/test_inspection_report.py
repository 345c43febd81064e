"""Reports of inspections that are made up: nothing is compiled here."""

import io
import json
import re
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
from made_inspections import EVERY, LONG, MIB, bare, made, noisy, sharded, whole

from compiled_loss.inspection.network import Collective
from compiled_loss.inspection.record import Inspection, Launch, Pass

needs_rich = pytest.mark.skipif(find_spec("rich") is None, reason="needs the extra inspect")


@pytest.mark.parametrize("name", EVERY)
def test_json_round_trip(name):
    inspection = EVERY[name]
    text = inspection.to_json()
    assert Inspection.from_json(text) == inspection
    assert set(json.loads(text)) == set(inspection.__dataclass_fields__)
    assert Inspection.from_json(text.replace('"seconds": 6.25', '"seconds": 6.5')) != inspection


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
def test_share_of_the_loss_in_the_report(width):
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
def test_collectives(width):
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
def test_collectives_in_the_docs():
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
def test_no_collectives():
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
def test_warnings(width):
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
def test_no_warning_of_saved_tensor_as_large_as_an_input():
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
