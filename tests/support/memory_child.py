"""Run in a child process by test_memory.py: one loss's real peak, and what it keeps, in bytes."""

import naive
import torch

from compiled_loss import Chunking, cross_entropy, linear_cross_entropy, token_statistics
from compiled_loss.measure import PeakMemory


def measure(strategy, chunk, tokens, width, vocab, mode, dtype="float32"):
    torch.set_num_threads(2)
    dtype = getattr(torch, dtype)
    hidden = torch.randn(tokens, width).to(dtype).requires_grad_()
    weight = (torch.randn(vocab, width) * 0.05).to(dtype).requires_grad_()
    labels = torch.randint(0, vocab, (tokens,))
    if strategy == "naive":

        def loss(h, w, y):
            return naive.linear_cross_entropy(h, w, y, chunks=vocab // chunk)
    else:

        def loss(h, w, y):
            compile_ = True if mode == "eager, compiled bodies" else "auto"
            chunking = Chunking(strategy=strategy, chunk_size=chunk, compile=compile_)
            return linear_cross_entropy(h, w, y, chunking=chunking)

    if mode == "compiled":
        loss = torch.compile(loss, fullgraph=True)

    def step(memory):
        start = memory.now()
        value = loss(hidden, weight, labels)
        kept = memory.now() - start
        torch.autograd.grad(value, (hidden, weight))
        return kept

    memory = PeakMemory(torch.device("cpu"))
    step(memory)  # compiles, and warms the GEMM library's own buffers
    with memory:
        kept = step(memory)
    return {"peak": memory.peak, "kept": kept}


def measure_heap():
    """Peaks, in MiB, of one block at a time and of two, where the heap holds several free."""
    size = 1 << 24
    torch.empty(size // 4).zero_()  # freed, it teaches glibc to take such blocks from the heap
    blocks = [torch.zeros(size // 4) for _ in range(5)]
    last = blocks.pop()  # keeps the others' memory in the heap
    blocks.clear()
    peaks = []
    for together in (False, True):
        with PeakMemory(torch.device("cpu")) as memory:
            first = torch.zeros(size // 4)
            if not together:
                del first
            second = torch.zeros(size // 4 + 4096)
            del second
        peaks.append(round(memory.peak / 2**20))
        first = None
    assert last.sum() == 0
    return peaks


def measure_logits(loss, shape, compiled):
    """Real peak over the inputs of a loss of logits and its gradients, and what it keeps, in bytes."""
    torch.set_num_threads(2)
    logits, labels = torch.randn(shape, requires_grad=True), torch.randint(0, shape[1], (shape[0], *shape[2:]))
    wanted, weights = [logits], torch.rand(shape[1])

    def of_labels(logits, labels):
        return cross_entropy(logits, labels, class_weights=weights, label_smoothing=0.1, class_dim=1)

    def of_statistics(logits, labels):
        statistics = token_statistics(logits, labels, class_dim=1)
        return (statistics.logprob + statistics.entropy).sum()

    call = of_statistics if loss == "statistics" else of_labels
    if loss == "probabilities":
        labels = torch.rand(shape, requires_grad=True)
        wanted.append(labels)
    call = torch.compile(call, fullgraph=True) if compiled else call

    def step(memory):
        start = memory.now()
        value = call(logits, labels)
        kept = memory.now() - start
        torch.autograd.grad(value, wanted)
        return kept

    memory = PeakMemory(torch.device("cpu"))
    step(memory)
    with memory:
        kept = step(memory)
    return {"peak": memory.peak, "kept": kept, "gradients": sum(4 * v.numel() for v in wanted)}
