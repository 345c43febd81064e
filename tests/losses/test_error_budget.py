"""Contract 4: errors stay within twice those of the unchunked computation in the same dtypes, and one rounding."""

import cases
import pytest
import torch
from comparing import assert_accurate, in_fp64
from torch.nn import functional as F

from compiled_loss import Chunking, cross_entropy, linear_cross_entropy, linear_token_statistics, reference
from compiled_loss.engine import gemm
from compiled_loss.testing import assert_within_error_budget, head_inputs

TOKENS, WIDTH, VOCAB = 448, 32, 896  # divisible by 7, 8 and 64


def unchunked(hidden, weight, labels, bias, **keywords):
    return F.cross_entropy((hidden @ weight.t()).float() + bias.float(), labels, **keywords)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("chunks", [1, 2, 7, 8, 64])
@pytest.mark.parametrize("strategy", ["tokens", "vocab"])
@pytest.mark.parametrize("confident", [0.0, 0.5, 1.0])
def test_linear_cross_entropy(dtype, chunks, strategy, confident):
    inputs = head_inputs(TOKENS, WIDTH, VOCAB, dtype=dtype, ignored=0.1, confident=confident)
    chunk = (TOKENS if strategy == "tokens" else VOCAB) // chunks
    fast = cases.linear(Chunking(strategy=strategy, chunk_size=chunk))
    assert_accurate(fast, unchunked, cases.truth(), inputs, name=f"{chunks} chunks")


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("form", ["tokens", "vocab", "logits", "traced"])
def test_a_loss_of_any_size_keeps_its_digits(form, compile):
    """Of 1e-2 to 1e-35, with its gradients, to a few roundings: p is 1 in fp32 for most of them.

    Logits are multiples of 1/8, which no GEMM rounds. An exponential, the sum of 49 and what is made of it take some
    ten roundings each way.
    """
    margins = torch.tensor([5.0, 9.0, 17.0, 30.0, 45.0, 60.0, 75.0, 85.0])
    weight = torch.arange(50 * 8).reshape(50, 8) % 5 / 8
    weight[7] = margins
    hidden, labels = torch.eye(8), torch.full((1,), 7)
    chunking = Chunking(compile=compile)
    if form in ("tokens", "vocab"):
        chunking = Chunking(strategy=form, chunk_size=3, compile=compile)

    def rows(hidden, weight):
        if form == "logits":
            return cross_entropy(hidden @ weight.t(), labels, reduction="sum", compile=compile)
        return linear_cross_entropy(hidden, weight, labels, reduction="sum", chunking=chunking)

    def truth(hidden, weight):
        z = hidden @ weight.t()
        others = torch.cat([z[:, :7], z[:, 8:]], 1) - z[:, 7:8]
        return torch.log1p(others.exp().sum(1)).sum()

    for i in range(8):  # one token at a time: a sum has the digits of its largest
        mine, exact = hidden[i : i + 1], hidden[i : i + 1].double()
        if form == "traced":
            found = torch.func.grad_and_value(rows, argnums=(0, 1))(mine, weight)
        else:
            inputs = [v.clone().requires_grad_() for v in (mine, weight)]
            loss = rows(*inputs)
            found = torch.autograd.grad(loss, inputs), loss.detach()
        expected = torch.func.grad_and_value(truth, argnums=(0, 1))(exact, weight.double())
        for one, other in zip((*found[0], found[1]), (*expected[0], expected[1]), strict=True):
            assert (one.double() - other).norm() <= 20 * torch.finfo(torch.float32).eps * other.norm(), i


@pytest.mark.parametrize("strategy", ["tokens", "vocab"])
def test_statistics_of_any_size_keep_their_digits(strategy):
    margins = torch.tensor([5.0, 17.0, 45.0, 75.0])
    weight = torch.arange(50 * 4).reshape(50, 4) % 5 / 8
    weight[7] = margins
    chunking = Chunking(strategy=strategy, chunk_size=3)
    found = linear_token_statistics(torch.eye(4), weight, torch.full((4,), 7), chunking=chunking)
    z = weight.t().double()
    log_p = torch.cat([z[:, :7], z[:, 8:]], 1) - z[:, 7:8]
    total = torch.log1p(log_p.exp().sum(1))
    log_p = torch.cat([log_p - total.unsqueeze(1), -total.unsqueeze(1)], 1)
    entropy = -(log_p.exp() * log_p).sum(1)
    torch.testing.assert_close(found.logprob.double(), -total, rtol=20 * 2**-23, atol=0)
    torch.testing.assert_close(found.entropy.double(), entropy, rtol=20 * 2**-23, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("strategy", ["tokens", "vocab"])
def test_ragged_and_whole_chunks(strategy, dtype):
    inputs = head_inputs(64, 16, 96, dtype=dtype, ignored=0.2)
    for size in (9, 64):
        loss = cases.linear(Chunking(strategy=strategy, chunk_size=size))
        assert_accurate(loss, cases.truth(), cases.truth(), inputs)


@pytest.mark.parametrize("chunks", [2, 7, 8])
@pytest.mark.parametrize("strategy", ["tokens", "vocab"])
def test_the_largest_error_of_a_bf16_accumulator(strategy, chunks):
    """Plan's NOTE [Accumulator]: a sum that grows evenly is rounded at 1/K, 2/K, ... of its size: (K + 1) / 2."""
    inputs = head_inputs(TOKENS, WIDTH, VOCAB, dtype=torch.bfloat16)
    exact = inputs.to(torch.float64)
    chunking = Chunking(strategy=strategy, chunk_size=(TOKENS if strategy == "tokens" else VOCAB) // chunks)
    results = []
    for fn, (hidden, weight, labels, _) in (
        (lambda *i: linear_cross_entropy(*i, chunking=chunking), inputs),
        (lambda h, w, y: F.cross_entropy((h @ w.t()).float(), y), inputs),
        (reference.linear_cross_entropy, exact),
    ):
        results.append(torch.autograd.grad(fn(hidden, weight, labels), (hidden, weight)))
    for mine, baseline, truth in zip(*results, strict=True):
        largest, allowed = ((v.double() - truth).abs().max() for v in (mine, baseline))
        assert largest <= (chunks + 1) / 2 * allowed + truth.abs().max() * torch.finfo(torch.bfloat16).eps / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("compiled", [False, True])
def test_softcap_of_confident_tokens(dtype, compiled):
    """The token strategy's maximum is found before the softcap."""
    softcap = 60.0
    inputs = head_inputs(TOKENS, WIDTH, VOCAB, dtype=dtype, confident=1.0)
    fast = cases.linear(Chunking(strategy="tokens", chunk_size=64), softcap=softcap)

    def capped(hidden, weight, labels, bias):
        logits = (hidden @ weight.t()).float() + bias.float()
        return F.cross_entropy(softcap * torch.tanh(logits / softcap), labels)

    mine = torch.compile(fast, fullgraph=True) if compiled else fast
    assert_accurate(mine, capped, cases.truth(softcap=softcap), inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("strategy", ["tokens", "vocab"])
def test_bias_gradient_is_summed_in_fp32_blocks(dtype, strategy, monkeypatch):
    """Narrow gradients are summed in fp32 a block of columns at a time; none of them ends where a chunk does."""
    inputs = head_inputs(60, 8, 101, dtype=dtype)
    fn = cases.linear(Chunking(strategy=strategy, chunk_size=23))
    (whole,) = torch.autograd.grad(fn(*inputs), inputs.bias)
    monkeypatch.setattr(gemm, "_BLOCK", 300)
    (blocks,) = torch.autograd.grad(fn(*inputs), inputs.bias)
    exact = inputs.to(torch.float64)
    (truth,) = torch.autograd.grad(cases.truth()(*exact), exact.bias)
    torch.testing.assert_close(blocks, whole, rtol=0, atol=0)
    assert (blocks.double() - truth).norm() < 4 * torch.finfo(dtype).eps * truth.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_confident_tokens_without_reduction(dtype):
    """The loss of a token with p > 0.99 is far smaller than the rounding error of its log-sum-exp."""
    inputs = head_inputs(TOKENS, WIDTH, VOCAB, dtype=dtype, confident=1.0)
    exact = inputs.to(torch.float64)
    truth = cases.truth(reduction="none")(*exact).detach()
    assert (truth < 0.01).double().mean() > 0.9
    sure = truth < 0.01
    baseline = unchunked(*inputs, reduction="none")
    fast = linear_cross_entropy(*inputs[:3], bias=inputs.bias, reduction="none", chunking=Chunking(strategy="vocab"))
    logits = (inputs.hidden @ inputs.weight.t()).float() + inputs.bias.float()
    for mine in (fast, cross_entropy(logits, inputs.labels, reduction="none")):
        assert_within_error_budget(mine[sure], baseline[sure], truth[sure], name="loss of confident tokens")


@pytest.mark.parametrize("strategy", ["tokens", "vocab"])
def test_fp16_at_65536_tokens(strategy):
    """Normalised over 65536 tokens, 99% of fp16 logits' gradients would flush to zero; a GradScaler comes too late."""
    inputs = head_inputs(TOKENS, WIDTH, VOCAB, dtype=torch.float16)
    exact = inputs.to(torch.float64)
    scale = torch.tensor(65536.0)  # what a GradScaler would hand down
    keywords = {"reduction": "sum", "num_label_tokens": 65536, "chunking": Chunking(strategy=strategy, chunk_size=64)}
    mine = cases.gradients(linear_cross_entropy(*inputs[:3], **keywords), inputs[:2], scale)
    truth = cases.gradients(reference.linear_cross_entropy(*exact[:3], reduction="sum"), exact[:2])
    unscaled = inputs.to(torch.float16)
    logits = (unscaled.hidden @ unscaled.weight.t()).float()
    baseline = cases.gradients(F.cross_entropy(logits, unscaled.labels, reduction="sum"), unscaled[:2])
    for name, a, b, c in zip(("dH", "dW"), mine, baseline, truth, strict=True):
        assert_within_error_budget(a, b, c, name=name)


@pytest.mark.parametrize(("upstream", "count"), [(1.0, 65536), (65536.0, 1)])
@pytest.mark.parametrize("strategy", ["tokens", "vocab"])
def test_fp16_at_any_scale(strategy, upstream, count):
    """Small gradients lose nothing but what their own dtype cannot hold; a GradScaler's do not overflow on the way."""
    inputs = head_inputs(TOKENS, WIDTH, VOCAB, dtype=torch.float16)
    hidden = (inputs.hidden.detach() / (1024 if upstream > 1 else 1)).requires_grad_()
    exact = [in_fp64(hidden), in_fp64(inputs.weight)]
    keywords = {"reduction": "sum", "num_label_tokens": count}
    loss = linear_cross_entropy(hidden, *inputs[1:3], chunking=Chunking(strategy=strategy, chunk_size=64), **keywords)
    mine = cases.gradients(loss, (hidden, inputs.weight), torch.tensor(upstream))
    exactly = reference.linear_cross_entropy(*exact, inputs.labels, **keywords)
    truth = cases.gradients(exactly, exact, torch.full_like(exactly, upstream))
    for name, a, c in zip(("dH", "dW"), mine, truth, strict=True):
        if c.abs().max() < torch.finfo(torch.float16).max:
            assert (a.double() - c).abs().max() < 2e-3 * c.abs().max() + 2**-24, name  # and a subnormal's spacing


@pytest.mark.parametrize("strategy", ["tokens", "vocab"])
def test_fp16_sums_past_its_range(strategy):
    """8192 times the same label with h = 10 sums to 81920 before the mean divides it."""
    hidden = torch.full((8192, 4), 10.0, dtype=torch.float16)
    weight = torch.zeros(8, 4, dtype=torch.float16, requires_grad=True)
    labels = torch.zeros(8192, dtype=torch.int64)
    linear_cross_entropy(hidden, weight, labels, chunking=Chunking(strategy=strategy)).backward()
    torch.testing.assert_close(weight.grad[:, 0], torch.tensor([-8.75] + [1.25] * 7, dtype=torch.float16))


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
    truth = cases.gradients(reference.linear_cross_entropy(*exact[:3], reduction="sum"), exact[:2])
    for name, a, c in zip(("dH", "dW"), mine, truth, strict=True):
        assert (a.double() - c).norm() < 2e-3 * c.norm(), name  # four roundings of 2^-11


def test_fp32_accumulator_beats_bf16():
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
