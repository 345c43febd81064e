"""Everything that an inspection holds as files, with a page that shows the tables and links to each file."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from html import escape
from itertools import groupby, repeat
from pathlib import Path
from urllib.parse import quote

from rich.console import RenderableType
from rich.table import Table

from compiled_loss.inspection.record import Inspection, Kernel
from compiled_loss.inspection.table import ALARM, WARNING, Cell, header, tables, warnings

ASSEMBLY = (".ptx", ".cubin", ".amdgcn", ".hsaco")
LONGEST = 90  # characters of a name in its file's
CLASSES = {ALARM: "alarm", WARNING: "warning"}
PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark }}
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 76em; margin: 2em auto; padding: 0 1em }}
pre, td, li {{ font: 13px/1.5 ui-monospace, monospace }}
pre, td {{ white-space: pre-wrap; overflow-wrap: anywhere }}
table {{ border-collapse: collapse; margin: 2em 0 }}
caption, h2 {{ font: bold 17px system-ui, sans-serif; text-align: left }}
th, td {{ padding: .15em 1.2em .15em 0; text-align: left; vertical-align: top; border-bottom: 1px solid #8884 }}
.number {{ text-align: right; white-space: nowrap }}
.alarm {{ color: #d33; font-weight: bold }}
.warning {{ color: #b8860b }}
ul {{ columns: 30em; padding-left: 1.2em; overflow-wrap: anywhere }}
</style>
<body>
{body}
</body>
</html>
"""


def dump(inspection: Inspection, folder: Path) -> None:
    """Writes graphs, host code, kernels, the report and `index.html` into `folder`, and links the assembly there."""
    files: dict[str, str] = {"report.json": inspection.to_json()}
    for i, graph in enumerate(inspection.graphs):
        name = _safe(f"{i:02}-{graph.direction}" + (f"-in-{graph.operator}" if graph.operator else ""))
        files[f"graphs/{name}.py"] = graph.nodes
        files[f"graphs/{name}-wrapper.py"] = graph.wrapper
    sources: dict[str, str] = {}
    for kernel in inspection.kernels:
        if kernel.source:
            sources[kernel.name] = _path(kernel, {path.lower() for path in files})
            files[sources[kernel.name]] = kernel.source
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text, encoding="utf-8")
    assembly = (path for path in folder.glob("assembly/*/*") if path.suffix in ASSEMBLY)
    paths = sorted([*map(Path, files), *(path.relative_to(folder) for path in assembly)])
    (folder / "index.html").write_text(_page(inspection, paths, sources), encoding="utf-8")


def _path(kernel: Kernel, taken: Collection[str]) -> str:
    """Returns a path for a kernel that no other file has, on file systems that ignore case as well."""
    suffix = ".cpp" if re.search(r'^#include|extern "C"', kernel.source, re.MULTILINE) else ".py"
    names = (f"kernels/{_safe(kernel.name)}{f'-{i}' if i else ''}{suffix}" for i in range(len(taken) + 1))
    return next(name for name in names if name.lower() not in taken)


def _safe(name: str) -> str:
    """Returns a name as part of a path. A long name loses its middle, because names differ at their ends."""
    safe = re.sub(r"[^\w-]+", "_", name, flags=re.ASCII)
    return safe if len(safe) <= LONGEST else f"{safe[: LONGEST // 2]}--{safe[-LONGEST // 2 :]}"


def _page(inspection: Inspection, paths: list[Path], sources: Mapping[str, str]) -> str:
    parts = [_tag("h1", escape(inspection.name)), _tag("pre", escape(header(inspection).plain))]
    parts += [_tag("p", escape(text.plain), CLASSES[str(text.style)]) for text in warnings(inspection)]
    parts += [_table(table, sources) for table in tables(inspection)]
    for parent, group in groupby(paths, lambda path: path.parent):
        items = (_tag("li", _link(path.as_posix(), path.name)) for path in group)
        parts += [_tag("h2", escape(parent.as_posix())), _tag("ul", "\n".join(items))]
    return PAGE.format(title=escape(inspection.name), body="\n".join(parts))


def _table(table: Table, sources: Mapping[str, str]) -> str:
    """Returns a terminal's table as HTML; names of kernels lead to their sources."""
    numbers = ["number" if column.justify == "right" else "" for column in table.columns]
    rows = [_tag("caption", escape(str(table.title)))]
    if table.show_header:
        heads = (escape(str(column.header)) for column in table.columns)
        rows.append(_tag("tr", "".join(map(_tag, repeat("th"), heads, numbers))))
    for row in zip(*(column.cells for column in table.columns), strict=True):
        cells = (_cell(cell, number, sources) for cell, number in zip(row, numbers, strict=True))
        rows.append(_tag("tr", "".join(cells)))
    return _tag("table", "\n".join(rows))


def _cell(cell: RenderableType, kind: str, sources: Mapping[str, str]) -> str:
    plain, style = (cell.plain, cell.style) if isinstance(cell, Cell) else (str(cell), "")
    shown = _link(sources[plain], plain) if plain in sources else escape(plain)
    return _tag("td", shown, f"{kind} {CLASSES.get(style, '')}".strip())


def _tag(name: str, inside: str, kind: str = "") -> str:
    return f'<{name} class="{kind}">{inside}</{name}>' if kind else f"<{name}>{inside}</{name}>"


def _link(path: str, text: str) -> str:
    return f'<a href="{quote(path)}">{escape(text)}</a>'
