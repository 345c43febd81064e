"""The table of fused heads over all families: as JSON, a line a case."""

import gc
import json
from typing import NamedTuple

from family_comparison import Row, row

DIGITS = {"own_loss": 8, "fused_loss": 8, "own_error": 2, "fused_error": 2}  # errors differ by machine


class Table(NamedTuple):
    transformers: str
    torch: str
    rows: dict

    @classmethod
    def read(cls, path):
        found = json.loads(path.read_text())
        return cls(
            found["transformers"], found["torch"], {name: Row(name, **rest) for name, rest in found["rows"].items()}
        )

    def write(self, path):
        lines = [f"  {json.dumps(name)}: {json.dumps(_told(self.rows[name]))}" for name in sorted(self.rows)]
        head = f'"transformers": {json.dumps(self.transformers)}, "torch": {json.dumps(self.torch)}, "rows":'
        path.write_text("{" + head + " {\n" + ",\n".join(lines) + "\n}}\n")

    def add(self, name, kind, given):
        self.rows[name] = row(name, kind, given)
        gc.collect()  # models hold themselves in cycles


def _told(row):
    told = {key: value for key, value in row._asdict().items() if value not in ("", None) and key != "name"}
    return {key: float(f"{value:.{DIGITS[key]}g}") if key in DIGITS else value for key, value in told.items()}
