"""What the compiler makes of every loss on a GPU that is not there: kernels, memory, operations, instructions, times.

    python -m benches.gpu_code                    # appended to benches/results, and printed as a table
    python -m benches.gpu_code --only plain

Generated for sm_90, bf16, at the widths of an 8B model and of Gemma. Nothing is timed but the inspection itself: H100
and H200 ms are rooflines, of matrix operations and of bytes; issue ms is what the instructions of generated kernels
take beside them where every scheduler issues one in each cycle of 1.98 GHz. Both sides of a branch are counted, and
torch's own kernels, as of a bias's sums, are not.
Results are one JSON object a line.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import re
import subprocess
import sys
import tempfile
from glob import escape
from pathlib import Path

import torch

from compiled_loss.inspection import Inspection, inspect

RESULTS = Path(__file__).parent / "results"
GIB = 1 << 30
ISSUED = 132 * 128 * 1.98e9  # threads' instructions a second, of an H100 or H200 SXM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--only", default="", help="cases whose names contain this")
    given = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
    import gpu_cases

    path = RESULTS / f"gpu_code-{torch.__version__.split('+')[0]}-sm_90.jsonl"
    print(
        "| shape | case | kernels | launches | peak GiB f / b | kept GiB | TFLOP | H100 ms | H200 ms "
        "| instructions a logit | issue ms | inspection s |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|---|")
    for model in ("8B", "Gemma"):
        shape = gpu_cases.SHAPES[model]
        for name, case in {**gpu_cases.cases(shape), "unchunked": None}.items():
            if given.only not in name:
                continue
            call, inputs, options = gpu_cases.unchunked, gpu_cases.linear("tokens", shape).inputs, {}
            if case is not None:
                call, inputs, options = case.call, case.inputs, case.options
            with tempfile.TemporaryDirectory() as folder:
                options = {**options, "assemble": ["cuda:sm_90"], "first_only": True}
                found = inspect(call, *inputs, dump=folder, **options)
                counts = instructions(found, Path(folder), shape[0] * shape[2])
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
                "instructions_per_logit": counts,
                "issue_seconds": sum(counts) * shape[0] * shape[2] / ISSUED,
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
                f"| {row['operations'] / 1e12:.1f} | {milliseconds} | {'+'.join(map('{:.0f}'.format, counts))} "
                f"| {1e3 * row['issue_seconds']:.2f} | {found.seconds:.1f} |",
                flush=True,
            )


def instructions(found: Inspection, folder: Path, logits: int) -> list[float]:
    """Instructions of all generated kernels, forward and backward, over the number of logits."""
    total = {}
    for kernel in found.kernels:
        if kernel.configurations:
            (cubin,) = folder.glob(f"assembly/*/{escape(kernel.name[-200:])}-0.cubin")
            sizes = {k: int(n) for k, n in re.findall(r"^    (\w+)numel = (\d+)", kernel.source, re.MULTILINE)}
            blocks = {k: int(n) for k, n in re.findall(r"(\w+)=(\d+)", kernel.configurations[0].options)}
            outer = {k: n for k, n in sizes.items() if k != "r0_"}
            outer = outer or {"x": rows(found, kernel.name, sizes.get("r0_", 1))}
            programs = math.prod(-(-n // blocks[f"{k.upper()}BLOCK"]) for k, n in outer.items())
            each = issued(disassembled(cubin), sizes.get("r0_", 0), blocks.get("R0_BLOCK", 0))
            total[kernel.name] = programs * 32 * blocks["warps"] * each
    return [sum(total.get(name, 0) * n for name, n in p.kernels.items()) / logits for p in found.passes]


def rows(found: Inspection, name: str, columns: int) -> int:
    """Of a launch of a kernel for any number of them, by the bf16 logits, which are nearly all that it reads."""
    launches = [launch for one in found.passes for launch in one.launches if launch.kernel == name]
    return max([launch.read_bytes for launch in launches]) // (2 * columns)


def disassembled(cubin: Path) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    return subprocess.run([tool, "-c", cubin], capture_output=True, text=True, check=True).stdout


def issued(sass: str, size: int, block: int) -> int:
    """How many instructions a thread issues, where loops over `size` columns advance by some blocks of them."""
    labels: dict[str, int] = {}
    code: list[str] = []
    for label, instruction in re.findall(r"^(\.L_x_\d+):|/\*[0-9a-f]{4,}\*/\s+(.*?) ;", sass, re.MULTILINE):
        if label:
            labels[label] = len(code)
        elif instruction != "NOP":
            code.append(instruction)
    count, last = len(code), 0
    for i, instruction in enumerate(code):
        target = re.search(r"BRA.*(\.L_x_\d+)", instruction)
        start = labels[target[1]] if target else i
        if start < i:
            if start < last:
                raise ValueError("loops that overlap")
            last = i + 1
            count += (last - start) * (-(-size // advance(code[start:last], block)) - 1)
    return count


def advance(loop: list[str], block: int) -> int:
    """The most that is added to a register that is compared with the loop's end: some blocks."""
    text = "\n".join(loop)
    steps = [0]
    for end in re.findall(r"ISETP\S* \S+, \S+, (U?R\d+)\S*, 0x", text):
        found = re.findall(rf"IADD3\S* (?:\S+, )*{end}(?:\.reuse)?, (?:\S+, )*0x([0-9a-f]+)", text)
        steps += [int(step, 16) for step in found]
    if not block or not max(steps) or max(steps) % block:
        raise ValueError(f"a loop that does not advance by {block}:\n{text}")
    return max(steps)


if __name__ == "__main__":
    main()
