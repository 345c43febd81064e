"""Modules of labels return what their function does: each keyword, everything at once, class weights that move."""

import inspect

import cases
import pytest
import torch

import compiled_loss
from compiled_loss import Chunking, nn
from compiled_loss.testing import head_inputs

SHELLS = {
    nn.CrossEntropy: compiled_loss.cross_entropy,
    nn.LinearCrossEntropy: compiled_loss.linear_cross_entropy,
}
N, H, V = 13, 6, 17


def test_what_a_module_shows_of_itself():
    assert repr(nn.CrossEntropy()) == "CrossEntropy()"
    made = nn.LinearCrossEntropy(softcap=2.0, class_weights=torch.ones(V), chunking=Chunking())
    assert repr(made) == "LinearCrossEntropy(class_weights=[17], softcap=2.0)"
    assert repr(compiled_loss.KDLoss(-100, 2.0)) == "KDLoss(temperature=2.0)"


# A value other than the default for every keyword, alone: one that is dropped or crossed with another changes the loss.
KEPT = {
    "class_weights": torch.linspace(0.1, 1, V),
    "ignore_index": 1,
    "label_smoothing": 0.1,
    "z_loss": 0.01,
    "softcap": 2.0,
    "logit_scale": 0.4,
    "temperature": 0.7,
    "shift": 2,
    "reduction": "none",
    "class_dim": 0,
    "chunking": Chunking(strategy="vocab", chunk_size=3),
}
PASSED = {
    "bias": torch.linspace(-1, 1, V),
    "mask": torch.arange(N) % 3 != 0,
    "token_weights": torch.linspace(0, 1, N),
    "num_label_tokens": 7,
}


@pytest.mark.parametrize(
    ("shell", "name"),
    [(s, name) for s, f in SHELLS.items() for name in [*KEPT, *PASSED] if name in inspect.signature(f).parameters],
)
def test_each_keyword_arrives(shell, name):
    function = SHELLS[shell]
    hidden, weight, labels, _ = (v.detach() for v in head_inputs(N, H, V, ignored=0.2))
    labels[:2] = 1
    if name == "class_dim":  # square, or the labels would fit one alone
        weight, labels = weight[:N], labels.clamp(max=N - 1)
    tensors = (hidden, weight, labels) if shell is nn.LinearCrossEntropy else (hidden @ weight.t(), labels)
    kept = {"reduction": "sum"} if name == "num_label_tokens" else {}
    plain = function(*tensors, **kept)
    kept.update({name: KEPT[name]} if name in KEPT else {})
    passed = {name: PASSED[name]} if name in PASSED else {}
    if name == "ignore_index":
        tensors = (*tensors[:-1], labels.clamp(min=0))
    made = shell(**kept)
    actual = made(*tensors, **passed)
    torch.testing.assert_close(actual, function(*tensors, **kept, **passed), rtol=0, atol=0)
    if name == "chunking":
        assert made.chunking is KEPT[name]
    else:
        assert actual.shape != plain.shape or not torch.allclose(actual, plain)


def test_every_keyword_has_a_value_here():
    names = {name for function in SHELLS.values() for name in inspect.signature(function).parameters}
    elsewhere = {"vocab_shard", "compile"}  # test_sharding, test_eager_kernels
    assert names == {"logits", "hidden", "weight", "labels", *elsewhere, *KEPT, *PASSED}


@pytest.mark.parametrize("shell", SHELLS)
def test_everything_and_its_gradients(shell):
    inputs = head_inputs(N, H, V, dtype=torch.float64, ignored=0.2, ignore_index=1)
    keywords = cases.everything(N, V)
    passed = {name: keywords.pop(name) for name in ("mask", "token_weights")}
    if shell is nn.LinearCrossEntropy:
        tensors, passed["bias"] = inputs[:3], inputs.bias
    else:
        tensors = ((inputs.hidden @ inputs.weight.t()).detach().requires_grad_(), inputs.labels)
    losses = [shell(**keywords)(*tensors, **passed), SHELLS[shell](*tensors, **keywords, **passed)]
    torch.testing.assert_close(*losses, rtol=0, atol=0)
    gradients = [torch.autograd.grad(loss, tensors[:-1]) for loss in losses]
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


@pytest.mark.parametrize("shell", SHELLS)
def test_no_parameters_and_class_weights_are_a_buffer(shell):
    weights = torch.linspace(0.1, 1, V)
    bare, made = shell(), shell(class_weights=weights)
    assert not [*bare.parameters(), *made.parameters()]
    assert list(bare.state_dict()) == []
    assert list(made.state_dict()) == ["class_weights"]
    assert made.to(torch.float64).class_weights.dtype == torch.float64
    assert made.to("meta").class_weights.device.type == "meta"
    assert weights.device.type == "cpu"
    assert bare.to(torch.float64).class_weights is None
    other = shell(class_weights=torch.zeros(V))
    other.load_state_dict(shell(class_weights=weights).state_dict())
    assert torch.equal(other.class_weights, weights)
    with pytest.raises(RuntimeError, match="class_weights"):
        bare.load_state_dict(other.state_dict())  # silently weighing nothing would be worse


def test_class_weights_that_moved_are_used():
    hidden, weight, labels, _ = head_inputs(N, H, V, dtype=torch.float64)
    classes = torch.linspace(0.1, 1, V)
    made = nn.LinearCrossEntropy(class_weights=classes).to(torch.float64)
    expected = compiled_loss.linear_cross_entropy(hidden, weight, labels, class_weights=classes.double())
    torch.testing.assert_close(made(hidden, weight, labels), expected, rtol=0, atol=0)


def test_shells_under_compile():
    inputs = head_inputs(N, H, V, dtype=torch.float64, ignored=0.2)
    keywords = {"class_weights": torch.rand(V), "softcap": 4.0, "z_loss": 0.1}
    for shell, tensors in (
        (nn.LinearCrossEntropy, inputs[:3]),
        (nn.CrossEntropy, ((inputs.hidden @ inputs.weight.t()).detach().requires_grad_(), inputs.labels)),
    ):
        made = shell(**keywords)
        losses = [f(*tensors) for f in (made, torch.compile(made, backend="eager", fullgraph=True))]
        torch.testing.assert_close(*losses)
        torch.testing.assert_close(*(torch.autograd.grad(loss, tensors[0]) for loss in losses))


def test_a_star_import_leaves_torchs_nn_alone():
    names = {}
    exec("import torch.nn as nn\nfrom compiled_loss import *", names)
    assert names["nn"] is torch.nn
    assert compiled_loss.nn is nn
