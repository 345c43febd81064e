"""How tests compare a loss with what it should be: by values and gradients, or by errors within their budget."""

import torch

from compiled_loss.testing import assert_within_error_budget, inputs_unchanged

TIGHT = {"rtol": 1e-11, "atol": 1e-12}  # fp64, a few hundred roundings


def assert_matches(fn, truth, inputs, wanted=None, upstream=None, **tolerance):
    """`fn(*inputs)` has the values and gradients of `truth(*inputs)`, and leaves its inputs as they were.

    wanted: tensors whose gradients are compared; the inputs that require one unless given.
    upstream, tolerance, and what is returned: see assert_same.
    """
    expected = truth(*inputs)
    tensors = [v for v in inputs if isinstance(v, torch.Tensor)]
    wanted = [v for v in tensors if v.requires_grad] if wanted is None else wanted
    with inputs_unchanged(*tensors):
        return assert_same(fn(*inputs), expected, wanted, upstream, **tolerance)


def assert_same(actual, expected, wanted, upstream=None, **tolerance):
    """Values, a tensor or a tuple of tensors, and their gradients with respect to `wanted` are the expected ones.

    upstream: the gradient of the values, random unless given.
    tolerance: of torch.testing.assert_close; unless given TIGHT for fp64, and assert_close's own for other dtypes.

    Returns:
        The gradients of `actual`, None where the values do not depend on a tensor, as the expected ones may not.
    """
    names = getattr(expected, "_fields", None)
    actual, expected = ([v] if isinstance(v, torch.Tensor) else list(v) for v in (actual, expected))
    names = names or [f"value {i}" for i in range(len(expected))]
    assert [v is None for v in actual] == [v is None for v in expected]
    names = [name for name, v in zip(names, expected, strict=True) if v is not None]
    actual, expected = ([x for x in v if x is not None] for v in (actual, expected))
    for name, mine, theirs in zip(names, actual, expected, strict=True):
        _close(mine, theirs, name, tolerance)
    trained = [i for i, v in enumerate(expected) if v.requires_grad]
    assert trained and len(wanted), "nothing to differentiate"
    upstream = [0.5 + torch.rand_like(expected[i]) for i in trained] if upstream is None else [upstream]
    gradients = torch.autograd.grad([actual[i] for i in trained], wanted, upstream, allow_unused=True)
    truths = torch.autograd.grad([expected[i] for i in trained], wanted, upstream, retain_graph=True, allow_unused=True)
    assert any(g is not None for g in truths), "no gradient to compare"
    for i, (mine, theirs) in enumerate(zip(gradients, truths, strict=True)):
        name = f"gradient {i}, {list(wanted[i].shape)}"
        assert (mine is None) == (theirs is None), f"{name}: got {mine}, expected {theirs}"
        if theirs is not None:
            _close(mine, theirs, name, tolerance)
    return gradients


def _close(mine, theirs, name, tolerance):
    tolerance = tolerance or (TIGHT if theirs.dtype == torch.float64 else {})
    torch.testing.assert_close(mine, theirs, **tolerance, msg=lambda text: f"{name}: {text}")


def in_fp64(value):
    """A fresh leaf with the same numbers; labels, and None, as they are."""
    if value is None or not value.is_floating_point():
        return value
    return value.detach().double().requires_grad_(value.requires_grad)


def assert_accurate(fn, baseline, truth, inputs, upstream=None, name=""):
    """Contract 4: value and gradients are within the error budget, against those of fp64.

    fn, baseline: functions of `inputs`; the second is the unchunked computation in the same dtypes.
    truth: a function of `inputs` in fp64.
    upstream: the gradient of the values, 1 unless given.
    """
    exact = [in_fp64(v) for v in inputs]
    outcomes = []
    for function, arguments in ((fn, inputs), (baseline, inputs), (truth, exact)):
        value = function(*arguments)
        given = None if upstream is None else upstream.to(value.dtype)
        trained = [v for v in arguments if v is not None and v.requires_grad]
        outcomes.append((value, *torch.autograd.grad(value, trained, given)))
    for i, three in enumerate(zip(*outcomes, strict=True)):
        assert_within_error_budget(*three, name=f"{name} {f'gradient {i - 1}' if i else 'value'}")
