"""The report of an inspection, as tables for a terminal. `dump` puts the same tables into a page."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Column, Table
from rich.text import Text

from compiled_loss.inspection.network import NETWORKS, Collective
from compiled_loss.inspection.picture import Skyline, scaled, size
from compiled_loss.inspection.record import Configuration, Inspection, Kernel, Launch, Saved
from compiled_loss.inspection.targets import GPUS

ALARM, WARNING = "bold red", "yellow"
HOST = {"sync": "the host waits for the device", "transfer": "between host and device"}
FLOP = ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP")


@dataclass(frozen=True)
class Cell:
    """A text that loses its middle where it does not fit: names and paths differ at their ends."""

    plain: str
    style: str = ""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        plain, gap = self.plain, "..." if options.ascii_only else "…"
        if len(plain) > options.max_width:
            tail = max(options.max_width - len(gap), 0) // 2
            plain = plain[: max(options.max_width - len(gap) - tail, 0)] + gap + plain[len(plain) - tail :]
        yield Text(plain, self.style, no_wrap=True, overflow="crop")

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(min(len(self.plain), 12), len(self.plain)).with_maximum(options.max_width)


def report(*inspections: Inspection) -> Group:
    """Returns the whole report of one inspection, or the summaries of several side by side."""
    parts: list[RenderableType] = [text for i in inspections for text in (header(i), *warnings(i), Text())]
    alone = len(inspections) == 1
    for table in tables(*inspections) if alone else [_summary(*inspections)]:
        parts += [table, ""]
    top = max((launch.live_bytes for i in inspections for launch in _launches(i)), default=0)
    if top > 0:
        parts.append(Text(f"Live memory over the launches, forward | backward, up to {size(top)}", "bold"))
        for inspection in inspections:
            parts += [Skyline(inspection, top)] if alone else [Cell(inspection.name), Skyline(inspection, top)]
    return Group(*parts)


def header(inspection: Inspection) -> Text:
    """Returns a text that says what was inspected, and with what."""
    triton = f"triton {inspection.triton}, " if inspection.triton else ""
    made = f"torch {inspection.torch}, {triton}inspected in {inspection.seconds:.1f} s"
    name = Text.assemble((inspection.name, "bold"), f" on {inspection.device}")
    return Text("\n  ").join([name, Text(made), *map(Text, inspection.inputs)])


def warnings(inspection: Inspection) -> list[Text]:
    """Returns the facts that a reader must not miss."""
    reasons = [" ".join(b.reason.partition("Explanation:")[0].split()) for b in inspection.breaks]  # all in --json
    found = [
        (f"graph break at {b.location or '?'}: {reason}", ALARM)
        for b, reason in zip(inspection.breaks, reasons, strict=True)
    ]
    waits = Counter((launch.kind, launch.kernel) for launch in _launches(inspection) if launch.kind in HOST)
    found += [(f"{n} x {kernel} ({kind}): {HOST[kind]}", ALARM) for (kind, kernel), n in waits.items()]
    for kernel in inspection.kernels:
        for target, ways in _by_target(kernel):
            spills = [way.spills for way in ways]
            if any(spills):
                some = f"{sum(map(bool, spills))} of {len(spills)} configurations for {target}"
                text = f"spills up to {max(spills)} bytes a thread in {some}: {kernel.name}"
                found.append((text, ALARM if spills[0] else WARNING))
    large = _large(inspection)
    found += [(f"keeps {size(s.size)}, more than any input: {s.origin} {s.location}", WARNING) for s in large]
    if not large and inspection.saved_bytes > sum(_sizes(inspection)) > 0:
        text = f"keeps {size(inspection.saved_bytes)} in {len(inspection.saved)} tensors, more than all inputs together"
        found.append((text, WARNING))
    found += [(note, WARNING) for note in inspection.notes]
    return [Text(f"! {text}", style) for text, style in found]


def tables(inspection: Inspection) -> list[Table]:
    """Returns the tables that are not empty of summary, kernels, GEMMs, collectives, saved tensors and guards."""
    large = _large(inspection)
    saved = [
        (f"{s.dtype}{list(s.shape)}", Cell(size(s.size), WARNING if s in large else ""), s.origin, s.location)
        for s in sorted(inspection.saved, key=lambda s: -s.size)
    ]
    equal = Counter((guard.code, guard.location) for guard in inspection.guards)
    guards = [(f"{n} x {code}" if n > 1 else code, line) for (code, line), n in equal.items()]
    found = (
        _summary(inspection),
        _kernels(inspection),
        _gemms(inspection, "GEMMs", "gemm"),
        _gemms(inspection, "Fused attention, its first factors", "attention"),
        _collectives(inspection),
        _table("Kept for backward, beside inputs and results", ("tensor", ">bytes", "origin", "line"), saved),
        _table("Guards: compiled again unless", ("condition", "line"), guards, most=12),
    )
    return [table for table in found if table.row_count]


def _summary(*inspections: Inspection) -> Table:
    """Returns the summary, with a column for each inspection; two of them get their ratio."""
    columns = [_figures(inspection) for inspection in inspections]
    rows: list[Sequence[str | Cell]] = []
    for label in dict.fromkeys(label for column in sorted(columns, key=len, reverse=True) for label in column):
        found = [column.get(label, (0, "-")) for column in columns]
        ratio = [f"{found[1][0] / found[0][0]:.2f}"] if len(found) == 2 and all(n for n, _ in found) else []
        loud = ALARM if label == "graph breaks" else ""
        rows.append((label, *(Cell(text, loud if number else "") for number, text in found), *ratio))
    names = [f">{inspection.name}" for inspection in inspections] if len(inspections) > 1 else [">"]
    return _table("Summary", ("", *names, *[">2nd / 1st"] * (len(names) == 2)), rows)


def _figures(inspection: Inspection) -> dict[str, tuple[float, str]]:
    """Returns {label: (number, text)}; counts are of forward + backward."""
    passes, measured, peak = inspection.passes, inspection.measured, inspection.peak_bytes
    breaks, moved = len(inspection.breaks), sum(p.moved_bytes for p in passes)
    graphs, inner = len(inspection.graphs), sum(bool(graph.operator) for graph in inspection.graphs)
    found: dict[str, tuple[float, str]] = {
        "graphs": (graphs, f"{graphs - inner:,}" + f" + {inner:,} inner" * bool(inner)),
        "graph breaks": (breaks, f"{breaks:,}"),
        "launches": (inspection.launches, " + ".join(f"{len(p.launches):,}" for p in passes)),
        "kernels": (sum(len(p.kernels) for p in passes), " + ".join(f"{len(p.kernels):,}" for p in passes)),
        "peak over inputs": (peak, size(peak)),
    }
    peaks = zip(("  forward", "  backward"), (p.peak_bytes for p in passes), strict=False)
    found |= {label: (number, size(number)) for label, number in peaks}
    if measured:
        found["  measured"] = measured.peak_bytes, size(measured.peak_bytes)
        found["  prediction is off by"] = 0, f"{peak / measured.peak_bytes - 1:+.1%}" if measured.peak_bytes else "-"
    if inspection.highest_bytes > peak:
        found["  at most"] = inspection.highest_bytes, size(inspection.highest_bytes)  # attention's scratch
    found["kept for backward"] = inspection.saved_bytes, size(inspection.saved_bytes)
    found["operations"] = inspection.operations, scaled(inspection.operations, 1000, FLOP)
    found["bytes moved"] = moved, size(moved)
    names = [name for name, gpu in GPUS.items() if gpu.target == inspection.device]
    times = {f"roofline on {name}": inspection.roofline_seconds(name) or 0.0 for name in names}
    times |= {"measured time": measured.seconds} if measured else {}
    found |= {label: (seconds, _milliseconds(seconds)) for label, seconds in times.items()}
    found |= _loss(inspection, names)
    counts = [len(p.collectives) for p in passes]
    if any(counts):
        sent = inspection.sent_bytes
        found |= {"collectives": (sum(counts), " + ".join(f"{n:,}" for n in counts)), "  sent": (sent, size(sent))}
        for label, spread in (("  packed", False), ("  spread", True)):
            seconds = inspection.communication_seconds(spread=spread)
            found[label] = seconds or 0.0, _milliseconds(seconds)
    return found


def _loss(inspection: Inspection, gpus: Sequence[str]) -> dict[str, tuple[float, str]]:
    """Returns the loss's part of the figures, if its launches are known and there are others."""
    own = [launch for launch in _launches(inspection) if launch.of_loss]
    if not inspection.loss or not 0 < len(own) < inspection.launches:
        return {}
    operations, peak = sum(launch.operations for launch in own), inspection.loss_peak_bytes
    parts: list[tuple[str, float, float, str]] = [
        ("peak", peak, inspection.peak_bytes, size(peak)),
        ("kept", inspection.loss_saved_bytes, inspection.saved_bytes, size(inspection.loss_saved_bytes)),
        ("operations", operations, inspection.operations, scaled(operations, 1000, FLOP)),
    ]
    for name in gpus:
        seconds = inspection.roofline_seconds(name, of_loss=True) or 0.0
        parts.append((f"roofline on {name}", seconds, inspection.roofline_seconds(name) or 0.0, _milliseconds(seconds)))
    found: dict[str, tuple[float, str]] = {"loss, launches": (len(own), f"{len(own):,}")}
    return found | {f"  {name}": (part, f"{text} {part / (all_ or 1):4.0%}") for name, part, all_, text in parts}


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:,.3f} ms"


def _kernels(inspection: Inspection) -> Table:
    """Returns the table of launches and bytes; for assembled kernels, with the resources of the first configuration."""
    kernels = {kernel.name: kernel for kernel in inspection.kernels}
    kinds, moved = {name: str(kernel.kind) for name, kernel in kernels.items()}, Counter(dict.fromkeys(kernels, 0))
    for launch in _launches(inspection):
        moved[launch.kernel] += launch.read_bytes + launch.written_bytes
        kinds[launch.kernel] = launch.kind
    targets = list(dict.fromkeys(way.target for kernel in inspection.kernels for way in kernel.configurations))
    rows: list[Sequence[str | Cell]] = []
    for name, total in moved.most_common():
        kind = Cell(kinds[name], ALARM if kinds[name] in HOST else "")
        counts = (str(p.kernels.get(name, "-")) if p else "-" for p in (inspection.forward, inspection.backward))
        rows.append((name, kind, *counts, size(total)))
        for target, ways in _by_target(kernels[name]) if name in kernels else ():
            spills = Cell(str(ways[0].spills), ALARM if ways[0].spills else "")
            first = rows.pop() if len(targets) == 1 else (f"  {target}", "", "", "", "")
            rows.append((*first, str(ways[0].registers), spills, size(ways[0].shared), str(len(ways))))
    title = "Kernels, most bytes first" + (f"; first configuration for {targets[0]}" if len(targets) == 1 else "")
    machine = (">regs", ">spills", ">shared", ">configs") if targets else ()
    return _table(title, ("name", "kind", ">fwd", ">bwd", ">bytes", *machine), rows)


def _gemms(inspection: Inspection, title: str, kind: str) -> Table:
    """Returns the table of launches of a kind, by operator, shapes and dtype."""
    counts: defaultdict[tuple[str, ...], list[int]] = defaultdict(lambda: [0, 0, 0])
    for i, one in enumerate(inspection.passes):
        for gemm in (launch for launch in one.launches if launch.kind == kind):
            count = counts[gemm.kernel, gemm.shapes, gemm.dtype]
            count[i] += 1
            count[2] += gemm.operations
    rows = [(*key, *(str(n or "-") for n in count[:2]), scaled(count[2], 1000, FLOP)) for key, count in counts.items()]
    return _table(title, ("operator", "shapes", "dtype", ">fwd", ">bwd", ">together"), rows)


def _collectives(inspection: Inspection) -> Table:
    """Returns the table of collectives; bytes sent and times are of all collectives in a row."""
    network, title = NETWORKS.get(inspection.device), "Collectives"
    if network is not None:
        within, across = (link.bytes_per_second / 1e9 for link in (network.within, network.across))
        title += f"; NVLink at {within:.0f} GB/s, InfiniBand at {across:.0f} GB/s"
    counts: defaultdict[Collective, list[int]] = defaultdict(lambda: [0, 0])
    for i, one in enumerate(inspection.passes):
        for collective in one.collectives:
            counts[collective][i] += 1
    rows = []
    for each, count in counts.items():
        sent = "-" if each.sent_bytes is None else size(each.sent_bytes * sum(count))
        seconds = (each.seconds(network, nodes) if network else None for nodes in (None, each.ranks))
        times = (_milliseconds(None if one is None else one * sum(count)) for one in seconds)
        rows.append((each.kind, str(each.ranks), size(each.size), *(str(n or "-") for n in count), sent, *times))
    return _table(title, ("kind", ">ranks", ">bytes", ">fwd", ">bwd", ">sent", ">packed", ">spread"), rows)


def _table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str | Cell]], most: int = 48) -> Table:
    """Returns a table. A column of numbers is aligned to the right, and its head begins with ">"."""
    columns = [Column(Text(h.lstrip(">")), justify="right" if h[:1] == ">" else "left", overflow="fold") for h in heads]
    table = Table(*columns, box=None, pad_edge=False, collapse_padding=True, header_style="dim")
    table.title, table.title_justify, table.show_header = Text(title, "bold"), "left", any(h.strip(">") for h in heads)
    for row in rows[:most]:
        table.add_row(*(Cell(cell) if isinstance(cell, str) else cell for cell in row))
    if len(rows) > most:
        table.add_row(Cell(f"and {len(rows) - most} more, see --json", "dim"))
    return table


def _launches(inspection: Inspection) -> list[Launch]:
    return [launch for p in inspection.passes for launch in p.launches]


def _by_target(kernel: Kernel) -> list[tuple[str, list[Configuration]]]:
    targets = dict.fromkeys(way.target for way in kernel.configurations)
    return [(target, [way for way in kernel.configurations if way.target == target]) for target in targets]


def _large(inspection: Inspection) -> list[Saved]:
    """Returns the saved tensors that are larger than every input."""
    largest = max(_sizes(inspection), default=0)
    return [saved for saved in inspection.saved if saved.size > largest > 0]


def _sizes(inspection: Inspection) -> list[int]:
    """Returns the bytes of inputs, which text such as `bf16[8192,4096]:grad` describes, and of parameters.

    The number in a dtype is of bits.
    """
    found = (re.match(r"[a-z]+(\d*)\w*\[([\d, ]*)\]", given) for given in inspection.inputs)
    inputs = [int(m[1] or 8) // 8 * prod(int(n) for n in m[2].split(",") if n.strip()) for m in found if m]
    return [*inputs, *inspection.parameters]
