"""Contract of the Modules: a module's constructor and call together are its function, keyword by keyword."""

import inspect

import cases
import pytest
import torch
from comparing import assert_matches, assert_same

import compiled_loss
from compiled_loss import Chunking, nn
from compiled_loss.testing import head_inputs

MODULES = {
    nn.CrossEntropy: compiled_loss.cross_entropy,
    nn.LinearCrossEntropy: compiled_loss.linear_cross_entropy,
}
OTHERS = {
    nn.Distillation: compiled_loss.distillation,
    nn.LinearDistillation: compiled_loss.linear_distillation,
    nn.LinearSoftCrossEntropy: compiled_loss.linear_soft_cross_entropy,
    nn.MultiTokenPrediction: compiled_loss.multi_token_prediction,
}
N, H, V = 13, 6, 17


def described(parameters):
    return {p.name: (p.kind, p.default, p.annotation) for p in parameters}


def assert_same_keywords(module, function):
    kept = described(list(inspect.signature(module.__init__).parameters.values())[1:])
    called = described(list(inspect.signature(module.forward).parameters.values())[1:])
    expected = described(inspect.signature(function).parameters.values())
    assert not kept.keys() & called.keys(), "a keyword is both kept and passed"
    assert {**called, **kept} == expected
    assert inspect.signature(module.forward).return_annotation == inspect.signature(function).return_annotation
    tensors = [name for name, (kind, *_) in expected.items() if kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    assert [name for name, (kind, *_) in called.items() if kind is inspect.Parameter.POSITIONAL_OR_KEYWORD] == tensors


@pytest.mark.parametrize("module", [*MODULES, *OTHERS])
def test_keywords_of_module_and_function(module):
    assert_same_keywords(module, {**MODULES, **OTHERS}[module])
    assert {module.__name__ for module in [*MODULES, *OTHERS]} == set(nn.__all__)


@pytest.mark.parametrize("module", OTHERS)
def test_every_argument_reaches_the_function(module, monkeypatch):
    """Each by its own object, where the function would be."""
    signature, seen = inspect.signature(OTHERS[module]), {}

    def function(*args, **kwargs):
        seen.update(signature.bind(*args, **kwargs).arguments)

    monkeypatch.setattr(inspect.getmodule(module), OTHERS[module].__name__, function)
    made = module()
    kept = {name: object() for name in list(inspect.signature(module.__init__).parameters)[1:]}
    passed = {name: object() for name in list(inspect.signature(module.forward).parameters)[1:]}
    for name, value in kept.items():
        assert getattr(made, name) == signature.parameters[name].default
        setattr(made, name, value)
    made(**passed)
    assert seen == {**kept, **passed}


@pytest.mark.parametrize("module", OTHERS)
def test_constructor_validates(module):
    bad = {"divergence": "kl", "temperature": 0.0, "scaling_factor": -1.0, "reduction": "avg", "chunking": 4}
    bad |= {"ignore_index": "pad", "softcap": 0.0, "hard_label_weight": 2.0, "jsd_weight": 1.0, "chunk_size": -1}
    bad |= {"fp32_upcast": 1, "class_dim": "classes"}
    for name in list(inspect.signature(module.__init__).parameters)[1:]:
        with pytest.raises((ValueError, TypeError), match=f"^{name}: expected"):
            module(**{name: bad[name]})


def drifted(change):
    """A function like `linear_cross_entropy`, with its parameters changed."""
    signature = inspect.signature(compiled_loss.linear_cross_entropy)
    parameters = change(dict(signature.parameters))

    def function():
        """Only its signature matters."""

    function.__signature__ = signature.replace(parameters=list(parameters.values()))
    return function


def without(name):
    return lambda parameters: {k: p for k, p in parameters.items() if k != name}


def replaced(which, **changes):
    return lambda parameters: {**parameters, which: parameters[which].replace(**changes)}


@pytest.mark.parametrize(
    "change",
    [
        without("z_loss"),
        without("mask"),
        replaced("softcap", name="soft_cap"),
        replaced("ignore_index", default=-1),
        replaced("mask", default=1),
        replaced("temperature", annotation="int"),
        replaced("labels", kind=inspect.Parameter.KEYWORD_ONLY),
        lambda ps: {**ps, "new": inspect.Parameter("new", inspect.Parameter.KEYWORD_ONLY, default=0)},
        lambda ps: {name: ps[name] for name in ["weight", "hidden", *list(ps)[2:]]},
    ],
)
def test_keyword_check_fails_on_a_difference(change):
    assert_same_keywords(nn.LinearCrossEntropy, drifted(dict))  # an unchanged signature passes
    with pytest.raises(AssertionError):
        assert_same_keywords(nn.LinearCrossEntropy, drifted(change))


def test_keyword_check_fails_on_another_default():
    class Drifted(nn.CrossEntropy):
        def __init__(self, *, ignore_index: int = -1, **keywords):
            super().__init__(ignore_index=ignore_index, **keywords)

    with pytest.raises(AssertionError):
        assert_same_keywords(Drifted, compiled_loss.cross_entropy)


# A value other than the default for every keyword, alone: one that is dropped or crossed with another changes the loss.
KEPT = {
    "class_weights": torch.linspace(0.1, 1, V),
    "ignore_index": 1,
    "label_smoothing": 0.1,
    "z_loss": 0.01,
    "softcap": 2.0,
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
    ("module", "name"),
    [(s, name) for s, f in MODULES.items() for name in [*KEPT, *PASSED] if name in inspect.signature(f).parameters],
)
def test_each_keyword_changes_the_loss(module, name):
    function = MODULES[module]
    hidden, weight, labels, _ = (v.detach() for v in head_inputs(N, H, V, ignored=0.2))
    labels[:2] = 1
    if name == "class_dim":  # square, or the labels would fit one alone
        weight, labels = weight[:N], labels.clamp(max=N - 1)
    tensors = (hidden, weight, labels) if module is nn.LinearCrossEntropy else (hidden @ weight.t(), labels)
    kept = {"reduction": "sum"} if name == "num_label_tokens" else {}
    plain = function(*tensors, **kept)
    kept.update({name: KEPT[name]} if name in KEPT else {})
    passed = {name: PASSED[name]} if name in PASSED else {}
    if name == "ignore_index":
        tensors = (*tensors[:-1], labels.clamp(min=0))
    made = module(**kept)
    actual = made(*tensors, **passed)
    torch.testing.assert_close(actual, function(*tensors, **kept, **passed), rtol=0, atol=0)
    if name == "chunking":
        assert made.chunking is KEPT[name]
    else:
        assert actual.shape != plain.shape or not torch.allclose(actual, plain)


def test_every_keyword_has_a_value_here():
    names = {name for function in MODULES.values() for name in inspect.signature(function).parameters}
    elsewhere = {"vocab_shard", "compile"}  # test_sharding, test_eager_kernels
    assert names == {"logits", "hidden", "weight", "labels", *elsewhere, *KEPT, *PASSED}


@pytest.mark.parametrize("module", MODULES)
def test_everything_matches_the_function(module):
    inputs = head_inputs(N, H, V, dtype=torch.float64, ignored=0.2, ignore_index=1)
    keywords = cases.everything(N, V)
    passed = {name: keywords.pop(name) for name in ("mask", "token_weights")}
    if module is nn.LinearCrossEntropy:
        tensors, passed["bias"] = inputs[:3], inputs.bias
    else:
        tensors = ((inputs.hidden @ inputs.weight.t()).detach().requires_grad_(), inputs.labels)
    losses = [module(**keywords)(*tensors, **passed), MODULES[module](*tensors, **keywords, **passed)]
    assert_same(*losses, tensors[:-1], rtol=0, atol=0)


@pytest.mark.parametrize("module", MODULES)
def test_state_dict_holds_class_weights_alone(module):
    weights = torch.linspace(0.1, 1, V)
    bare, made = module(), module(class_weights=weights)
    assert not [*bare.parameters(), *made.parameters()]
    assert list(bare.state_dict()) == []
    assert list(made.state_dict()) == ["class_weights"]
    assert made.to(torch.float64).class_weights.dtype == torch.float64
    assert made.to("meta").class_weights.device.type == "meta"
    assert weights.device.type == "cpu"
    assert bare.to(torch.float64).class_weights is None
    other = module(class_weights=torch.zeros(V))
    other.load_state_dict(module(class_weights=weights).state_dict())
    assert torch.equal(other.class_weights, weights)
    with pytest.raises(RuntimeError, match="class_weights"):
        bare.load_state_dict(other.state_dict())  # silently weighing nothing would be worse


def test_class_weights_move_with_the_module():
    hidden, weight, labels, _ = head_inputs(N, H, V, dtype=torch.float64)
    classes = torch.linspace(0.1, 1, V)
    made = nn.LinearCrossEntropy(class_weights=classes).to(torch.float64)
    expected = compiled_loss.linear_cross_entropy(hidden, weight, labels, class_weights=classes.double())
    torch.testing.assert_close(made(hidden, weight, labels), expected, rtol=0, atol=0)


def test_modules_compiled():
    inputs = head_inputs(N, H, V, dtype=torch.float64, ignored=0.2)
    keywords = {"class_weights": torch.rand(V), "softcap": 4.0, "z_loss": 0.1}
    for module, tensors in (
        (nn.LinearCrossEntropy, inputs[:3]),
        (nn.CrossEntropy, ((inputs.hidden @ inputs.weight.t()).detach().requires_grad_(), inputs.labels)),
    ):
        made = module(**keywords)
        assert_matches(torch.compile(made, backend="eager", fullgraph=True), made, tensors)


def test_star_import_does_not_shadow_torch_nn():
    names = {}
    exec("import torch.nn as nn\nfrom compiled_loss import *", names)
    assert names["nn"] is torch.nn
    assert compiled_loss.nn is nn
