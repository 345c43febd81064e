"""The helpers that the other tests rely on fail when they should. Those on Inductor's graphs: see test_compiled.py."""

from functools import partial
from typing import NamedTuple

import pytest
import torch
from comparing import assert_accurate, assert_matches

from compiled_loss.testing import assert_within_error_budget, count_graphs, head_inputs, inputs_unchanged

# The error budget ---------------------------------------------------------------------------------------------------

TRUTH = torch.linspace(1, 2, 64, dtype=torch.float64)


def off(error):
    """The truth in fp32, further off than its own rounding."""
    return (TRUTH * (1 + error)).float()


@pytest.mark.parametrize(
    ("times", "passes"), [(0, True), (1, True), (1.9, True), (2.1, False), (3, False), (-3, False)]
)
def test_twice_the_error_is_the_budget(times, passes):
    call = partial(assert_within_error_budget, off(times * 1e-4), off(1e-4), TRUTH)
    if passes:
        call()
    else:
        with pytest.raises(AssertionError, match=r"^dW: error \d.* exceeds 2.0 x the baseline's \d"):
            call(name="dW")
        call(factor=4.0)


def test_one_rounding_is_free():
    """Where the baseline happens to be exact."""
    truth = torch.full((64,), 1 + 2**-24, dtype=torch.float64)  # halfway between two fp32 numbers
    assert_within_error_budget(torch.ones(64), truth, truth)
    with pytest.raises(AssertionError, match="error"):
        assert_within_error_budget(torch.full((64,), 1 - 2**-23), truth, truth)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_number_that_is_not_finite_is_over_any_budget(value):
    actual = off(0)
    actual[5] = value
    with pytest.raises(AssertionError, match="error"):
        assert_within_error_budget(actual, off(1e-4), TRUTH, factor=1e9)


def test_shapes_and_dtypes():
    with pytest.raises(AssertionError, match=r"dH: shape \(1, 64\), expected \(64,\)"):  # it would broadcast
        assert_within_error_budget(off(0)[None], off(0), TRUTH, name="dH")
    with pytest.raises(AssertionError, match="float64"):
        assert_within_error_budget(off(0), off(0), TRUTH.float())
    assert_within_error_budget(torch.empty(0), torch.empty(0), torch.empty(0, dtype=torch.float64))
    with pytest.raises(AssertionError, match="shape"):
        assert_within_error_budget(off(0), off(0), torch.empty(0, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_subnormal_truth_is_no_trap(dtype):
    """Rounding there is absolute, and flushing to zero a rounding error of the baseline's size."""
    truth = torch.full((8,), 0.4 * torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps, dtype=torch.float64)
    assert_within_error_budget(truth.to(dtype), truth.to(dtype), truth)
    with pytest.raises(AssertionError, match="error"):
        assert_within_error_budget(torch.full((8,), 1e-3, dtype=dtype), truth.to(dtype), truth)


# Inputs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(1.0),
        torch.tensor(3),
        torch.ones(4, 6),
        torch.ones(4, 6, dtype=torch.bfloat16).t(),
        torch.ones(4, 6)[:, ::2],
        torch.ones(4, 1).expand(4, 6),
        torch.ones(5, dtype=torch.int64),
        torch.ones(5, dtype=torch.bool),
        torch.full((3,), float("nan")),
    ],
    ids=lambda t: f"{tuple(t.shape)}-{t.dtype}-{t.stride()}",
)
def test_inputs_unchanged(tensor):
    bystander = torch.zeros(2)
    with inputs_unchanged(bystander, tensor):
        tensor + tensor
    before = tensor.clone()
    with pytest.raises(AssertionError, match=r"^input 1, .* was written"), inputs_unchanged(bystander, tensor):
        tensor[(0,) * tensor.dim()] = 0
    tensor.copy_(before) if tensor.stride()[-1:] != (0,) else tensor[:, :1].copy_(before[:, :1])
    with inputs_unchanged(tensor, bystander):
        pass


def test_inputs_unchanged_sees_a_sign_and_a_leaf():
    zero = torch.zeros(3)
    with pytest.raises(AssertionError, match="was written"), inputs_unchanged(zero):
        zero.neg_()  # -0.0 == 0.0, bit by bit it is not
    leaf = torch.ones(3, requires_grad=True)
    with pytest.raises(AssertionError, match="was written"), inputs_unchanged(leaf), torch.no_grad():
        leaf.add_(1)


def test_inputs_unchanged_lets_errors_through():
    with pytest.raises(KeyError), inputs_unchanged(torch.ones(1)):
        raise KeyError


def test_inputs_unchanged_of_nothing():
    with inputs_unchanged(), inputs_unchanged(torch.empty(0), torch.empty(0, 3)):
        pass


# Graphs -------------------------------------------------------------------------------------------------------------


def test_count_graphs_counts_recompiles():
    calls = [[torch.ones(n)] for n in (2, 3, 4)]
    assert count_graphs(lambda x: x + 1, calls[:1] * 3) == 1
    assert count_graphs(lambda x: x + 1, calls) == 2  # the second size makes it symbolic
    assert count_graphs(lambda x: x + 1, calls, dynamic=True) == 1
    assert count_graphs(lambda x: x + 1, calls, dynamic=False) == 3
    assert count_graphs(lambda x, flag: x + flag, [[torch.ones(2), flag] for flag in (True, False)]) == 2


def test_count_graphs_starts_afresh():
    def fn(x):
        return x * 2

    assert [count_graphs(fn, [[torch.ones(2)]]) for _ in range(2)] == [1, 1]


def test_count_graphs_takes_no_break():
    def broken(x):
        torch._dynamo.graph_break()
        return x + 1

    with pytest.raises(Exception, match="graph_break"):
        count_graphs(broken, [[torch.ones(2)]])


# Random inputs ------------------------------------------------------------------------------------------------------


def label_probability(inputs, bias):
    z = inputs.hidden @ inputs.weight.t() + (inputs.bias if bias else 0)
    return z.softmax(-1).gather(-1, inputs.labels[:, None])[:, 0]


@pytest.mark.parametrize(("width", "vocab"), [(64, 50), (64, 1000), (256, 5000)])
@pytest.mark.parametrize("bias", [False, True])
def test_confident_tokens_are(width, vocab, bias):
    """From a width of 64: on narrower heads another class may lie in nearly the same direction."""
    sure = label_probability(head_inputs(300, width, vocab, dtype=torch.float64, confident=1.0), bias)
    assert (sure > 0.99).all()
    half = label_probability(head_inputs(300, width, vocab, dtype=torch.float64, confident=0.5), bias)
    assert 0.4 < (half > 0.99).double().mean() < 0.6
    none = label_probability(head_inputs(300, width, vocab, dtype=torch.float64), bias)
    assert (none < 0.9).all()


@pytest.mark.parametrize("ignored", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("ignore_index", [-100, 7])
def test_fraction_of_ignored_labels(ignored, ignore_index):
    labels = head_inputs(5000, 2, 1000, ignored=ignored, ignore_index=ignore_index).labels
    assert (labels == ignore_index).double().mean().item() == pytest.approx(ignored, abs=0.03)
    kept = labels[labels != ignore_index]
    assert ((kept >= 0) & (kept < 1000)).all()


def test_logits_are_of_unit_scale():
    hidden, weight, _, bias = head_inputs(300, 64, 500)
    assert (hidden @ weight.t() + bias).std().item() == pytest.approx(1.0, abs=0.1)


def test_seeds():
    before = torch.get_rng_state()
    first, again = head_inputs(9, 4, 7, seed=3), head_inputs(9, 4, 7, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, head_inputs(9, 4, 7, seed=4), strict=True))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_shapes_and_leaves(tokens):
    inputs = head_inputs(tokens, 4, 7, dtype=torch.bfloat16, confident=0.5)
    hidden, weight, labels, bias = inputs
    assert (hidden.shape, weight.shape, labels.shape, bias.shape) == ((tokens, 4), (7, 4), (tokens,), (7,))
    assert labels.dtype == torch.int64
    for moved in (inputs, inputs.to(torch.float64), inputs.to(torch.bfloat16)):
        for mine, theirs in zip(moved, inputs, strict=True):
            assert torch.equal(mine.double(), theirs.double())
            assert mine.is_leaf
            assert mine.requires_grad == mine.is_floating_point()
    assert inputs.to(torch.bfloat16).weight.data_ptr() != weight.data_ptr()


# What tests compare ---------------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    wave: torch.Tensor
    total: torch.Tensor


class OffByALittle(torch.autograd.Function):
    """The right value, and a gradient that is wrong by 1e-9 of itself."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g * (1 + 1e-9)


def square(x, y, _labels=None):
    return Pair(x.square() * y, x.square().sum())


WRONG = {
    "wave: .*not close": lambda x, y, _: square(x, y)._replace(wave=x.square() * y * (1 + 1e-9)),
    "total: .*not close": lambda x, y, _: square(x, y)._replace(total=x.square().sum() + 1e-9),
    r"gradient 0, \[3\]: .*not close": lambda x, y, _: square(OffByALittle.apply(x), y),
    r"gradient 1, \[3\]: got None": lambda x, y, _: square(x, y.detach()),
    "input 2, .* was written": lambda x, y, labels: square(x, y, labels.zero_()),
}


@pytest.mark.parametrize("message", WRONG)
def test_assert_matches_fails(message):
    x, y = (torch.linspace(1, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    labels = torch.ones(3, dtype=torch.int64)
    gradients = assert_matches(square, square, (x, y, labels))
    assert [g.shape for g in gradients] == [x.shape, y.shape]
    with pytest.raises(AssertionError, match=f"(?s)^{message}"):
        assert_matches(WRONG[message], square, (x, y, labels))


def test_assert_matches_compares_something():
    x = torch.ones(3, requires_grad=True)
    with pytest.raises(AssertionError, match="nothing to differentiate"):
        assert_matches(torch.exp, lambda v: v.detach().exp(), (x,))
    for wanted in ([], [torch.ones(2, requires_grad=True)]):
        with pytest.raises(AssertionError, match=r"nothing to differentiate|no gradient to compare"):
            assert_matches(torch.exp, torch.exp, (x,), wanted)


def test_assert_accurate_fails():
    """Of a value that is right, the gradient is not overlooked."""
    x, upstream = torch.linspace(1, 2, 64, requires_grad=True), torch.ones(64)
    assert_accurate(torch.exp, torch.exp, torch.exp, [x], upstream)
    with pytest.raises(AssertionError, match=r"^narrow gradient 0: error"):
        assert_accurate(lambda v: v.detach().exp() + v - v.detach(), torch.exp, torch.exp, [x], upstream, "narrow")
