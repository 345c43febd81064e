"""Contract 4: errors against fp64 stay within twice those of the unchunked computation in the same dtypes."""

import cases
import pytest
import torch
from torch.nn import functional as F

from compiled_loss import Chunking, cross_entropy, linear_cross_entropy, reference
from compiled_loss.testing import assert_within_error_budget, head_inputs

TOKENS, WIDTH, VOCAB = 448, 32, 896  # divisible by 7 and 64


def unchunked(hidden, weight, labels, bias, **keywords):
    return F.cross_entropy((hidden @ weight.t()).float() + bias.float(), labels, **keywords)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("chunks", [1, 2, 7, 64])
@pytest.mark.parametrize("strategy", ["tokens", "vocab"])
@pytest.mark.parametrize("confident", [0.0, 0.5, 1.0])
def test_linear(dtype, chunks, strategy, confident):
    inputs = head_inputs(TOKENS, WIDTH, VOCAB, dtype=dtype, ignored=0.1, confident=confident)
    exact = inputs.to(torch.float64)
    chunk = (TOKENS if strategy == "tokens" else VOCAB) // chunks
    fast = cases.linear(Chunking(strategy=strategy, chunk_size=chunk))
    results = []
    for fn, arguments in ((fast, inputs), (unchunked, inputs), (cases.linear(), exact)):
        loss = fn(*arguments)
        results.append((loss, *cases.gradients(loss, arguments, None)))
    for name, mine, baseline, truth in zip(("loss", "dH", "dW", "db"), *results, strict=True):
        assert_within_error_budget(mine, baseline, truth.double(), name=f"{name} at {chunks} chunks")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_confident_tokens_one_by_one(dtype):
    """The loss of a token with p > 0.99 is far smaller than the rounding error of its log-sum-exp."""
    inputs = head_inputs(TOKENS, WIDTH, VOCAB, dtype=dtype, confident=1.0)
    exact = inputs.to(torch.float64)
    truth = unchunked_fp64(exact)
    assert (truth < 0.01).double().mean() > 0.9
    sure = truth < 0.01
    baseline = unchunked(*inputs, reduction="none")
    fast = linear_cross_entropy(*inputs[:3], bias=inputs.bias, reduction="none", chunking=Chunking(chunk_size=100))
    logits = (inputs.hidden @ inputs.weight.t()).float() + inputs.bias.float()
    for mine in (fast, cross_entropy(logits, inputs.labels, reduction="none")):
        assert_within_error_budget(mine[sure], baseline[sure], truth[sure], name="loss of confident tokens")


def unchunked_fp64(exact):
    return reference.linear_cross_entropy(*exact[:3], bias=exact.bias, reduction="none").detach()


@pytest.mark.parametrize("strategy", ["tokens", "vocab"])
def test_fp16_at_65536_tokens(strategy):
    """Normalised over 65536 tokens, 99% of fp16 logits' gradients would flush to zero; a GradScaler comes too late."""
    inputs = head_inputs(TOKENS, WIDTH, VOCAB, dtype=torch.float16)
    exact = inputs.to(torch.float64)
    scale = torch.tensor(65536.0)  # what a GradScaler would hand down
    keywords = {"reduction": "sum", "num_label_tokens": 65536, "chunking": Chunking(strategy=strategy, chunk_size=64)}
    mine = cases.gradients(linear_cross_entropy(*inputs[:3], **keywords), inputs[:2], scale)
    truth = cases.gradients(reference.linear_cross_entropy(*exact[:3], reduction="sum"), exact[:2], None)
    unscaled = inputs.to(torch.float16)
    baseline = cases.gradients(
        F.cross_entropy((unscaled[0] @ unscaled[1].t()).float(), unscaled[2], reduction="sum"), unscaled[:2], None
    )
    for name, a, b, c in zip(("dH", "dW"), mine, baseline, truth, strict=True):
        assert_within_error_budget(a, b, c, name=name)


@pytest.mark.parametrize("strategy", ["tokens", "vocab"])
def test_fp16_token_weights_of_any_size(strategy):
    """The same with the normalisation in the token weights."""
    inputs = head_inputs(TOKENS, WIDTH, VOCAB, dtype=torch.float16)
    exact = inputs.to(torch.float64)
    weights = torch.full((TOKENS,), 1 / 65536)
    loss = linear_cross_entropy(
        *inputs[:3], token_weights=weights, reduction="sum", chunking=Chunking(strategy=strategy)
    )
    mine = cases.gradients(loss, inputs[:2], torch.tensor(65536.0))
    truth = cases.gradients(reference.linear_cross_entropy(*exact[:3], reduction="sum"), exact[:2], None)
    for name, a, c in zip(("dH", "dW"), mine, truth, strict=True):
        assert (a.double() - c).norm() < 2e-3 * c.norm(), name  # four roundings of 2^-11


def test_wide_accumulators_earn_their_bytes():
    """64 chunks into a bf16 accumulator would exceed the budget; the default is then fp32."""
    inputs = head_inputs(4096, 8, 64, dtype=torch.bfloat16)
    exact = inputs.to(torch.float64)
    (truth,) = torch.autograd.grad(reference.linear_cross_entropy(*exact[:3]), exact.weight)
    errors = {}
    for dtype in (None, torch.bfloat16):
        chunking = Chunking(strategy="tokens", chunk_size=64, accumulate_dtype=dtype)
        (mine,) = torch.autograd.grad(linear_cross_entropy(*inputs[:3], chunking=chunking), inputs.weight)
        assert mine.dtype == torch.bfloat16
        errors[dtype] = (mine.double() - truth).norm() / truth.norm()
    assert errors[None] < errors[torch.bfloat16] / 2
