"""How the error of dW grows with the chunks that are added into it, in bf16 and in fp32: MAX_ROUNDINGS of the planner.

    python -m benches.accumulation

Against fp64, relative by norms, of bf16 inputs. Results are appended to benches/results, one JSON object a line.
"""

from __future__ import annotations

import argparse
import json

import torch
from torch.nn import functional as F

from benches.run import RESULTS, machine
from compiled_loss import Chunking, linear_cross_entropy

TOKENS, WIDTH, VOCAB = 8192, 256, 2048
CHUNKS = (1, 2, 4, 8, 16, 32, 64, 256, 1024)
DTYPES = (torch.bfloat16, torch.float32)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, dtype=torch.bfloat16)
    weight = (torch.randn(VOCAB, WIDTH) * WIDTH**-0.5).bfloat16().requires_grad_()
    labels = torch.randint(0, VOCAB, (TOKENS,))
    exact = weight.detach().double().requires_grad_()
    (truth,) = torch.autograd.grad(F.cross_entropy(hidden.double() @ exact.t(), labels), exact)

    def error(loss: torch.Tensor) -> float:
        (found,) = torch.autograd.grad(loss, weight)
        return float(f"{((found.double() - truth).norm() / truth.norm()).item():.3g}")

    rows = [
        {"chunks": None, "accumulator": None, "error": error(F.cross_entropy((hidden @ weight.t()).float(), labels))}
    ]
    for chunks in CHUNKS:
        for dtype in DTYPES:
            chunking = Chunking(strategy="tokens", chunk_size=TOKENS // chunks, accumulate_dtype=dtype)
            found = error(linear_cross_entropy(hidden, weight, labels, chunking=chunking))
            rows.append({"chunks": chunks, "accumulator": str(dtype), "error": found})
    about = {"tokens": TOKENS, "width": WIDTH, "vocab": VOCAB} | machine("cpu")
    with (RESULTS / f"accumulation-{torch.__version__.split('+')[0]}-cpu.jsonl").open("a") as lines:
        for row in rows:
            print(row)
            lines.write(json.dumps(row | about) + "\n")


if __name__ == "__main__":
    main()
