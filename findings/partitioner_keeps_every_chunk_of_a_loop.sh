#!/usr/bin/env bash
# One would guess: an autograd Function that goes through a large matrix in chunks, and asks to keep its inputs and one
# vector alone, keeps these alone when it is compiled, too.
# What happens (torch 2.13.0, seen 2026-11-30): the loop is unrolled, the chunks of backward are the same expressions as
# those of forward, and the partitioner keeps all of them. The whole matrix is held, without a graph break or a warning.
# Exits with 0 while that is so, with 1 once it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.3.4
cd "$folder"
TORCHINDUCTOR_CACHE_DIR="$folder/cache" "$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
from functorch.compile import min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd

print("torch", torch.__version__)
N, H, V, CHUNKS = 64, 8, 4096, 8


class LogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight):
        lse = torch.full((N,), -torch.inf)
        for part in weight.chunk(CHUNKS):
            lse = torch.logaddexp(lse, (hidden @ part.T).logsumexp(-1))
        ctx.save_for_backward(hidden, weight, lse)
        return lse

    @staticmethod
    def backward(ctx, upstream):
        hidden, weight, lse = ctx.saved_tensors
        d_hidden, d_weight = torch.zeros_like(hidden), []
        for part in weight.chunk(CHUNKS):
            p = (hidden @ part.T - lse[:, None]).exp() * upstream[:, None]
            d_hidden = d_hidden + p @ part
            d_weight.append(p.T @ hidden)
        return d_hidden, torch.cat(d_weight)


kept = {"eager": [], "compiled": []}


def note(graph, _inputs):
    outputs = next(iter(graph.graph.find_nodes(op="output"))).args[0]
    kept["compiled"] += [node.meta["val"].numel() for node in outputs if isinstance(node, torch.fx.Node)]
    return graph


hidden, weight = torch.randn(N, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
with torch.autograd.graph.saved_tensors_hooks(lambda t: kept["eager"].append(t.numel()) or t, lambda t: t):
    LogSumExp.apply(hidden, weight)
backend = aot_autograd(
    fw_compiler=note, bw_compiler=lambda graph, _inputs: graph, partition_fn=min_cut_rematerialization_partition
)
torch.compile(LogSumExp.apply, backend=backend, fullgraph=True)(hidden, weight)
numbers = {how: sum(sizes) for how, sizes in kept.items()}
print(f"the whole matrix {N * V}, a chunk {N * V // CHUNKS}; numbers that are kept: {numbers}")
all_kept = numbers["eager"] < 2 * V * H and numbers["compiled"] >= N * V
print("every chunk is kept" if all_kept else "CHANGED: what is kept is less than all chunks")
sys.exit(0 if all_kept else 1)
PYTHON
