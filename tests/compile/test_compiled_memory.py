"""Contract 5 where Inductor could break it silently: arguments that are parts of tensors, chunks of their own size.

The graphs are compiled as far as the partitioner where what is kept is asked, and to generated code where numbers are.
"""

import cases
import pytest
import torch
from comparing import assert_matches
from torch.autograd.graph import saved_tensors_hooks

import compiled_loss
from compiled_loss import Chunking, linear_distillation, reference
from compiled_loss.testing import head_inputs

N, H, V = 24, 11, 50
ROWS = Chunking(strategy="tokens", chunk_size=5)
COLUMNS = Chunking(strategy="vocab", chunk_size=20)


def chunked(lib, chunking):
    """A loss of each strategy, of hidden states, weight, labels and a teacher's hidden states."""
    keywords = {"chunking": chunking} if lib is not reference else {}
    return {
        "tokens": lambda h, w, y, t: lib.linear_cross_entropy(h, w, y, **keywords),
        "vocab": lambda h, w, y, t: lib.linear_cross_entropy(h, w, y, **keywords),
        "distillation": lambda h, w, y, t: lib.linear_distillation(h, w, t, w.detach() + 1, y, **keywords),
        "distillation, none": lambda h, w, y, t: lib.linear_distillation(
            h, w, t, w.detach() + 1, y, reduction="none", **keywords
        ),
        "logits": lambda h, w, y, t: lib.distillation(h @ w.t(), t @ w.detach().t(), y),
    }


@pytest.mark.parametrize(
    "name",
    [
        "tokens",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("vocab", "distillation", "distillation, none", "logits")),
    ],
)
def test_arguments_that_are_slices(name):
    """Operators get their memory from where the slice begins."""
    inputs = head_inputs(2 * N, H, V, dtype=torch.float64)
    teacher = torch.randn_like(inputs.hidden)
    chunking = COLUMNS if name == "vocab" else ROWS

    def step(loss):
        def of_slices(hidden, weight, labels, teacher):
            return loss(hidden[3 : 3 + N], weight, labels[7 : 7 + N], teacher[N:]).sum()

        return of_slices

    tensors = (inputs.hidden, inputs.weight, inputs.labels, teacher.detach())
    ours = torch.compile(step(chunked(compiled_loss, chunking)[name]), fullgraph=True)
    assert_matches(ours, step(chunked(reference, None)[name]), tensors)


@pytest.mark.parametrize("name", ["distillation", pytest.param("distillation, none", marks=pytest.mark.slow)])
def test_weight_shared_by_student_and_teacher(name):
    """One weight of both, as an EAGLE draft has."""
    inputs = head_inputs(N, H, V, dtype=torch.float64)
    both = torch.randn(2 * N, H, dtype=torch.float64, requires_grad=True)

    def loss(both, weight, labels):
        more = {"reduction": "none"} if "none" in name else {}
        return linear_distillation(both[:N], weight, both[N:], weight, labels, chunking=ROWS, **more).sum()

    tensors = (both, inputs.weight, inputs.labels)

    def truth(both, weight, labels):
        teacher = (both[N:].detach(), weight.detach())
        total = reference.linear_distillation(both[:N], weight, *teacher, labels, reduction="sum")
        return total if "none" in name else total / (labels != -100).sum()

    for run in (loss, torch.compile(loss, fullgraph=True)):
        assert_matches(run, truth, tensors)


@pytest.mark.parametrize("size", ["one chunk", "two, the last ragged", "three, the last ragged", "two even"])
@pytest.mark.parametrize("name", ["vocab", "distillation, none"])
def test_no_saved_logits_of_a_chunk(name, size):
    """The partitioner sees no logits that it could keep for backward."""
    extent = V if name == "vocab" else N
    chunk = {"one chunk": extent, "two, the last ragged": extent - 7, "two even": extent // 2}.get(
        size, extent // 3 + 1
    )
    inputs = head_inputs(N, H, V)
    chunking = Chunking(strategy="vocab" if name == "vocab" else "tokens", chunk_size=chunk)
    loss = torch.compile(chunked(compiled_loss, chunking)[name], fullgraph=True, backend="aot_eager_decomp_partition")
    kept = []
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss(inputs.hidden, inputs.weight, inputs.labels, torch.randn(N, H))
    logits = [t.shape for t in kept if t.dim() > 1 and H not in t.shape and t.shape[-1] > 1]
    assert logits == []


@pytest.mark.parametrize("strategy", ["tokens", "vocab"])
def test_weight_and_bias_of_one_storage(strategy):
    """Weight and bias in one flat buffer, as ZeRO lays them; class weights that are the bias."""
    inputs = head_inputs(13, 7, 29, dtype=torch.float64)
    flat = torch.cat([inputs.weight.detach().flatten(), inputs.bias.detach().abs()])
    weight, bias = flat[: 29 * 7].view(29, 7).requires_grad_(), flat[29 * 7 :].requires_grad_()
    keywords = {"label_smoothing": 0.1, "class_weights": bias.detach()}
    loss = torch.compile(cases.linear(cases.CHUNKINGS[strategy], **keywords), fullgraph=True)
    assert_matches(loss, cases.truth(**keywords), (inputs.hidden, weight, inputs.labels, bias))
