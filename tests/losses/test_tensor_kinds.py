"""Tensors that are no plain ones: subclasses, quantised, nested and sparse ones, dual tensors, and those on meta."""

import pytest
import torch
from operators import on_one_device

import compiled_loss
from compiled_loss import Chunking, cross_entropy, linear_cross_entropy, linear_distillation
from compiled_loss.testing import head_inputs

N, H, V = 12, 5, 17


def problem():
    inputs = head_inputs(N, H, V, dtype=torch.float64)
    return inputs.hidden.detach(), inputs.weight.detach(), inputs.labels


class Foreign(torch.Tensor):
    """A wrapper as quantisation libraries have them: a floating dtype, and nothing of it in memory."""

    @staticmethod
    def __new__(cls, codes):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

    def __init__(self, codes):
        self.codes = codes

    def __tensor_flatten__(self):
        return ["codes"], None

    @staticmethod
    def __tensor_unflatten__(inner, context, size, stride):
        return Foreign(inner["codes"])

    @classmethod
    def __torch_dispatch__(cls, function, types, args, kwargs=None):
        if function is torch.ops.aten.detach.default:
            return Foreign(args[0].codes)
        raise NotImplementedError(function)


def refused():
    quantised = "give its values in a floating dtype, or use a loss of the logits that its module computes"
    jagged = torch.nested.nested_tensor([torch.zeros(3, H), torch.zeros(2, H)], layout=torch.jagged)
    return {
        "wrapper": (Foreign(torch.zeros(V, H, dtype=torch.int8)), f"expected a plain Tensor, got Foreign: {quantised}"),
        "codes": (torch.zeros(V, H, dtype=torch.uint8), f"expected float32, .*, got torch.uint8: {quantised}"),
        "float8": (torch.zeros(V, H).to(torch.float8_e4m3fn), f"expected float32, .*, got .*: {quantised}"),
        "jagged": (jagged, r"expected a dense Tensor, got a nested one: use \.values\(\)"),
        "sparse": (torch.zeros(V, H).to_sparse(), r"expected a dense Tensor, got one of layout .*: use \.to_dense\(\)"),
    }


@pytest.mark.parametrize("name", ["wrapper", "codes", "float8", "jagged", "sparse"])
def test_subclass_quantised_nested_and_sparse_are_errors(name):
    """They passed every check, and an internal operator failed on them."""
    value, message = refused()[name]
    hidden, weight, labels = (v.float() if v.is_floating_point() else v for v in problem())
    calls = {
        "weight": lambda: linear_cross_entropy(hidden, value, labels),
        "hidden": lambda: linear_cross_entropy(value, weight, labels),
        "logits": lambda: cross_entropy(value, labels),
        "teacher_weight": lambda: linear_distillation(hidden, weight, hidden, value, labels),
        "teacher_logits": lambda: compiled_loss.distillation(hidden @ weight.t(), value, labels),
        "bias": lambda: linear_cross_entropy(hidden, weight, labels, bias=value),
    }
    for argument, call in calls.items():
        with pytest.raises(TypeError, match=f"^{argument}: {message}"):
            call()


def test_tensor_subclass_is_an_error_compiled():
    hidden, _, labels = problem()
    weight = refused()["wrapper"][0]
    with pytest.raises(Exception, match="expected a plain Tensor, got Foreign"):
        torch.compile(lambda w: linear_cross_entropy(hidden.float(), w, labels), backend="aot_eager", fullgraph=True)(
            weight
        )


@pytest.mark.parametrize("strategy", ["tokens", "vocab"])
@pytest.mark.parametrize("argument", ["hidden", "weight", "bias"])
@pytest.mark.parametrize("trained", [True, False])
def test_forward_ad_dual_tensors_are_errors(argument, trained, strategy):
    """The tangent was dropped where no input required a gradient."""
    hidden, weight, labels = problem()
    tensors = {"hidden": hidden, "weight": weight, "bias": torch.zeros(V, dtype=torch.float64)}
    tensors = {k: v.requires_grad_(trained) for k, v in tensors.items()}
    chunking = Chunking(strategy=strategy, chunk_size=5)
    calls = [
        lambda **k: linear_cross_entropy(**k, labels=labels, chunking=chunking),
        lambda **k: compiled_loss.linear_token_statistics(**k, labels=labels),
    ]
    for call in calls:
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(tensors[argument], torch.ones_like(tensors[argument]))
            with pytest.raises(
                RuntimeError, match=f"^{argument}: expected a Tensor without a tangent, .*torch.func.jvp"
            ):
                call(**tensors | {argument: dual})
    found = torch.func.jvp(
        lambda v: calls[0](**tensors | {argument: v}),
        (tensors[argument].detach(),),
        (torch.ones_like(tensors[argument]),),
    )
    assert found[1].isfinite()


@pytest.mark.parametrize("strategy", ["tokens", "vocab"])
def test_meta_device(strategy):
    """ "unknown device type for autocast" in every loss."""
    hidden, weight, labels = (v.to("meta") for v in problem())
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    chunking = Chunking(strategy=strategy, chunk_size=5)
    with on_one_device("meta"):
        loss = linear_cross_entropy(hidden, weight, labels, chunking=chunking)
        gradients = torch.autograd.grad(loss, (hidden, weight))
    assert loss.is_meta and loss.shape == ()
    for found, value in zip(gradients, (hidden, weight), strict=True):
        assert found.is_meta and found.shape == value.shape
    logits = (hidden @ weight.t()).detach().requires_grad_()
    for loss in (
        cross_entropy(logits, labels),
        compiled_loss.distillation(logits, logits.detach(), labels),
        compiled_loss.masked_soft_cross_entropy(logits, logits.detach(), labels != -100),
    ):
        assert torch.autograd.grad(loss, logits)[0].is_meta
    for loss in (
        linear_distillation(hidden, weight, hidden.detach(), weight.detach(), labels),
        compiled_loss.multi_token_prediction([hidden], weight, labels),
    ):
        assert torch.autograd.grad(loss, (hidden, weight))[1].is_meta
