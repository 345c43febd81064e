"""Write the table of fused heads over all families of transformers: python tools/families.py [--page] [NAME ...].

With names of rows these are made anew, and the others stay. With --page the table's page is printed, in Markdown.
"""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "tests" / "integrations" / "transformers_families.json"


def main() -> None:
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]  # of a checkout that is not installed
    import torch
    import transformers
    from family_classes import cases
    from family_table import Table

    if "--page" in sys.argv[1:]:
        print(page(Table.read(TABLE)))
        return
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    known = cases()
    names = sys.argv[1:] or list(known)
    table = Table.read(TABLE) if sys.argv[1:] else Table(transformers.__version__, torch.__version__, {})
    for number, name in enumerate(names, 1):
        table.add(name, *known[name])
        print(f"{number}/{len(names)} {name}: {table.rows[name].outcome}", flush=True)
        table.write(TABLE)


def page(table) -> str:
    """Counts, and the classes of each reason."""
    rows = table.rows.values()
    by_outcome = {outcome: [r for r in rows if r.outcome == outcome] for outcome in ("equal", "refused", "not built")}
    counts = ", ".join(f"{len(found)} {outcome}" for outcome, found in by_outcome.items())
    lines = [f"transformers {table.transformers}, torch {table.torch}: {len(table.rows)} cases, {counts}."]
    for outcome in ("refused", "not built"):
        lines += ["", f"| {outcome} because | classes |", "|---|---|"]
        reasons = defaultdict(list)
        for found in by_outcome[outcome]:
            reasons[reason(found)].append(found.name)
        lines += [f"| {why} | {', '.join(names)} |" for why, names in sorted(reasons.items())]
    ignoring = [r.name for r in by_outcome["equal"] if r.items == "ignored"]
    lines += [
        "",
        f"In {len(ignoring)} of the equal cases the model's own loss ignores `num_items_in_batch`. With a fused head "
        f"it still does, because the model's own code divides: {', '.join(ignoring)}.",
    ]
    return "\n".join(lines)


def reason(row) -> str:
    """Why, without the class's name and what to do instead."""
    for pattern, told in (
        (r"which also does ([^:]+):", r"its forward also does \1 to its logits"),
        (r"an nn\.Linear, got \S+\.(\w+), which has a forward of its own", r"its head, \1, has a forward of its own"),
        (r"returns the Linear that gives its logits, got \w+ with (\w+)", r"get_output_embeddings() gives \1"),
        (r"whose head was replaced", "its forward does not call the head that get_output_embeddings() gives"),
        (r"computes another or none", "its loss is no cross-entropy of the head's logits"),
    ):
        if match := re.search(pattern, row.reason):
            return match.expand(told)
    return row.reason.split(". ")[0]


if __name__ == "__main__":
    main()
