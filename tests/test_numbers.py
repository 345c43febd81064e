"""Where a number is meant, whatever holds one is taken: numpy's scalars, whole floats, tensors, DTensors."""

import numpy as np
import pytest
import torch
from torch.distributed.tensor import Replicate, distribute_tensor

import compiled_loss
from compiled_loss import Chunking, cross_entropy, linear_cross_entropy, linear_distillation
from compiled_loss.checks import numbers
from compiled_loss.testing import count_graphs, head_inputs

N, H, V = 12, 5, 17
TIGHT = {"rtol": 1e-11, "atol": 1e-12}


@pytest.fixture(scope="module")
def mesh():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def problem():
    inputs = head_inputs(N, H, V, dtype=torch.float64)
    return inputs.hidden.detach(), inputs.weight.detach(), inputs.labels


FLOATS = {"numpy": np.float64, "0-d array": np.array, "tensor": torch.tensor, "[1]": lambda v: torch.tensor([v])}
INTS = {"numpy": np.int64, "whole float": float, "tensor": torch.tensor, "numpy's float": np.float32}


@pytest.mark.parametrize("how", FLOATS)
@pytest.mark.parametrize("name", ["label_smoothing", "z_loss", "softcap", "temperature"])
def test_numbers(name, how):
    hidden, weight, labels = problem()
    expected = linear_cross_entropy(hidden, weight, labels, **{name: 0.5})
    for strategy in ("tokens", "vocab"):
        keywords = {name: FLOATS[how](0.5), "chunking": Chunking(strategy=strategy, chunk_size=5)}
        torch.testing.assert_close(linear_cross_entropy(hidden, weight, labels, **keywords), expected, **TIGHT)
    logits = hidden @ weight.t()
    torch.testing.assert_close(cross_entropy(logits, labels, **{name: FLOATS[how](0.5)}), expected, **TIGHT)


@pytest.mark.parametrize("how", INTS)
@pytest.mark.parametrize(("name", "value"), [("num_label_tokens", 7), ("ignore_index", 3), ("shift", 1)])
def test_ints(name, value, how):
    hidden, weight, labels = problem()
    keywords = {"reduction": "sum"} if name == "num_label_tokens" else {}
    labels = labels.where(labels != -100, 3)
    expected = linear_cross_entropy(hidden, weight, labels, **keywords, **{name: value})
    keywords[name] = INTS[how](value)
    torch.testing.assert_close(linear_cross_entropy(hidden, weight, labels, **keywords), expected, **TIGHT)
    torch.testing.assert_close(cross_entropy(hidden @ weight.t(), labels, **keywords), expected, **TIGHT)


@pytest.mark.parametrize("how", FLOATS)
@pytest.mark.parametrize(
    "name",
    [
        *("jsd_weight", "temperature", "hard_label_weight"),
        *("softcap", "logit_scale", "teacher_softcap", "teacher_logit_scale"),
    ],
)
def test_distillation(name, how):
    hidden, weight, labels = problem()
    teacher = (torch.randn_like(hidden), torch.randn_like(weight))
    keywords = {"divergence": "jsd"}
    expected = linear_distillation(hidden, weight, *teacher, labels, **keywords, **{name: 0.375})
    keywords[name] = FLOATS[how](0.375)
    torch.testing.assert_close(linear_distillation(hidden, weight, *teacher, labels, **keywords), expected, **TIGHT)


def test_a_tensor_is_not_read_in_compiled_code():
    """A temperature that changes from step to step, as a tensor: one graph, and no break."""
    hidden, weight, labels = problem()

    def loss(hidden, temperature, smoothing):
        return linear_cross_entropy(hidden, weight, labels, temperature=temperature, label_smoothing=smoothing)

    steps = [(hidden, torch.tensor(t), torch.tensor(s)) for t, s in ((0.5, 0.1), (1.0, 0.0), (2.0, 0.2))]
    assert count_graphs(loss, steps) == 1
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for step in steps:
        expected = loss(step[0], step[1].item(), step[2].item())
        torch.testing.assert_close(compiled(*step), expected, rtol=1e-6, atol=1e-7)  # of fp32 temperatures


BAD = {
    "gradient": (
        {"temperature": torch.tensor(0.5, requires_grad=True)},
        ValueError,
        "temperature: .*requires_grad=True",
    ),
    "two": ({"softcap": torch.ones(2)}, TypeError, r"softcap: expected a number, got a Tensor \[2\] of torch.float32"),
    "bool": ({"z_loss": torch.tensor(True)}, TypeError, "z_loss: expected a number, got a Tensor .* of torch.bool"),
    "numpy's bool": ({"z_loss": np.bool_(True)}, TypeError, "z_loss: expected a number, got bool"),
    "range": ({"temperature": np.float32(-1)}, ValueError, "temperature: expected a number > 0, got -1"),
    "tensor's range": ({"softcap": torch.tensor(0.0)}, ValueError, "softcap: expected a number > 0 or None, got 0"),
    "fraction": ({"ignore_index": 0.5}, TypeError, "ignore_index: expected an int, got float"),
    "fractional count": ({"num_label_tokens": 0.5, "reduction": "sum"}, TypeError, "num_label_tokens: .*got float"),
    "text": ({"shift": "1"}, TypeError, "shift: expected an int, got str"),
}


@pytest.mark.parametrize("name", BAD)
def test_errors(name):
    keywords, kind, message = BAD[name]
    with pytest.raises(kind, match="^" + message):
        linear_cross_entropy(*problem(), **keywords)


def test_dtensors(mesh):
    """Their local value was dropped: "mixed torch.Tensor and DTensor"."""
    hidden, weight, labels = problem()
    classes, count = torch.rand(V, dtype=torch.float64), torch.tensor(7)
    placed = [distribute_tensor(v, mesh, [Replicate()]) for v in (classes, count)]
    for keywords in ({"class_weights": 0}, {"num_label_tokens": 1, "reduction": "sum"}):
        name = next(iter(keywords))
        plain, theirs = ({**keywords, name: v[keywords[name]]} for v in ((classes, count), placed))
        for call in (
            lambda **k: linear_cross_entropy(hidden, weight, labels, **k),
            lambda **k: linear_cross_entropy(hidden, distribute_tensor(weight, mesh, [Replicate()]), labels, **k),
            lambda **k: compiled_loss.linear_cross_entropy_with_statistics(hidden, weight, labels, **k).loss,
            lambda **k: cross_entropy(hidden @ weight.t(), labels, **k),
        ):
            torch.testing.assert_close(call(**theirs), call(**plain), **TIGHT)
    counts = [{"num_label_tokens": v} for v in (count, placed[1])]
    for call in (
        lambda **k: linear_distillation(hidden, weight, hidden, weight + 1, labels, reduction="sum", **k),
        lambda **k: compiled_loss.distillation(
            hidden @ weight.t(), hidden @ hidden.t() @ hidden @ weight.t(), labels, reduction="sum", **k
        ),
        lambda **k: compiled_loss.linear_soft_cross_entropy(
            hidden, weight, labels != -100, teacher_hidden=hidden, teacher_weight=weight + 1, reduction="sum", **k
        ),
        lambda **k: compiled_loss.multi_token_prediction([hidden], weight, labels, **k),
    ):
        torch.testing.assert_close(call(**counts[1]), call(**counts[0]), **TIGHT)


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
def test_tensors_that_hold_no_plain_numbers(name):
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


def test_a_wrapper_in_compiled_code():
    hidden, _, labels = problem()
    weight = refused()["wrapper"][0]
    with pytest.raises(Exception, match="expected a plain Tensor, got Foreign"):
        torch.compile(lambda w: linear_cross_entropy(hidden.float(), w, labels), backend="aot_eager", fullgraph=True)(
            weight
        )


@pytest.mark.parametrize("strategy", ["tokens", "vocab"])
@pytest.mark.parametrize("argument", ["hidden", "weight", "bias"])
@pytest.mark.parametrize("trained", [True, False])
def test_dual_tensors(argument, trained, strategy):
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
def test_meta(strategy):
    """ "unknown device type for autocast" in every loss."""
    hidden, weight, labels = (v.to("meta") for v in problem())
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    chunking = Chunking(strategy=strategy, chunk_size=5)
    loss = linear_cross_entropy(hidden, weight, labels, chunking=chunking)
    assert loss.is_meta and loss.shape == ()
    for found, value in zip(torch.autograd.grad(loss, (hidden, weight)), (hidden, weight), strict=True):
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


def test_what_is_readable():
    """Numbers are looked at in eager CPU code alone."""
    assert numbers.readable(torch.zeros(1)) and not numbers.readable(torch.zeros(1, device="meta"))
