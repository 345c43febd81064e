"""What the compiler makes of every loss on a GPU that is not there: kernels, memory, operations, the roofline.

    python -m benches.gpu_code                    # appended to benches/results, and printed as a table
    python -m benches.gpu_code --only plain

Generated for sm_90, bf16, at the widths of an 8B model and of Gemma. Nothing is timed but the inspection itself.
Results are one JSON object a line.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from pathlib import Path

import torch

from compiled_loss.inspection import inspect

RESULTS = Path(__file__).parent / "results"
GIB = 1 << 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--only", default="", help="cases whose names contain this")
    given = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    import gpu_cases

    path = RESULTS / f"gpu_code-{torch.__version__.split('+')[0]}-sm_90.jsonl"
    print(
        "| shape | case | kernels | launches | peak GiB f / b | kept GiB | TFLOP | H100 ms | H200 ms | inspection s |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for model in ("8B", "Gemma"):
        shape = gpu_cases.SHAPES[model]
        for name, case in {**gpu_cases.cases(shape), "unchunked": None}.items():
            if given.only not in name:
                continue
            call, inputs, options = gpu_cases.unchunked, gpu_cases.linear("tokens", shape).inputs, {}
            if case is not None:
                call, inputs, options = case.call, case.inputs, case.options
            found = inspect(call, *inputs, assemble=False, **options)
            row = {
                "shape": "x".join(map(str, shape)),
                "case": name,
                "kernels": [len(p.kernels) for p in found.passes],
                "launches": [len(p.launches) for p in found.passes],
                "peak_bytes": [p.peak_bytes for p in found.passes],
                "saved_bytes": found.saved_bytes,
                "operations": found.operations,
                "moved_bytes": sum(p.moved_bytes for p in found.passes),
                "roofline_seconds": {gpu: found.roofline_seconds(gpu) for gpu in ("H100", "H200")},
                "inspection_seconds": round(found.seconds, 2),
                "torch": found.torch,
                "triton": found.triton,
                "date": datetime.date.today().isoformat(),
            }
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            peak = " / ".join(f"{size / GIB:.3f}" for size in row["peak_bytes"])
            milliseconds = " | ".join(f"{1e3 * row['roofline_seconds'][gpu]:.2f}" for gpu in ("H100", "H200"))
            print(
                f"| {row['shape']} | {name} | {'+'.join(map(str, row['kernels']))} "
                f"| {'+'.join(map(str, row['launches']))} | {peak} | {row['saved_bytes'] / GIB:.4f} "
                f"| {row['operations'] / 1e12:.1f} | {milliseconds} | {found.seconds:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
