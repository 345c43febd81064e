"""Where a number is meant, whatever holds one is taken: numpy's scalars, whole floats, tensors, DTensors."""

import numpy as np
import pytest
import torch
from comparing import TIGHT
from torch.distributed.tensor import Replicate, distribute_tensor

import compiled_loss
from compiled_loss import Chunking, cross_entropy, linear_cross_entropy, linear_distillation
from compiled_loss.checks import numbers
from compiled_loss.testing import count_graphs, head_inputs

N, H, V = 12, 5, 17


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
def test_float_options(name, how):
    hidden, weight, labels = problem()
    expected = linear_cross_entropy(hidden, weight, labels, **{name: 0.5})
    for strategy in ("tokens", "vocab"):
        keywords = {name: FLOATS[how](0.5), "chunking": Chunking(strategy=strategy, chunk_size=5)}
        torch.testing.assert_close(linear_cross_entropy(hidden, weight, labels, **keywords), expected, **TIGHT)
    logits = hidden @ weight.t()
    torch.testing.assert_close(cross_entropy(logits, labels, **{name: FLOATS[how](0.5)}), expected, **TIGHT)


@pytest.mark.parametrize("how", INTS)
@pytest.mark.parametrize(("name", "value"), [("num_label_tokens", 7), ("ignore_index", 3), ("shift", 1)])
def test_int_options(name, value, how):
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
def test_distillation_options(name, how):
    hidden, weight, labels = problem()
    teacher = (torch.randn_like(hidden), torch.randn_like(weight))
    keywords = {"divergence": "jsd"}
    expected = linear_distillation(hidden, weight, *teacher, labels, **keywords, **{name: 0.375})
    keywords[name] = FLOATS[how](0.375)
    torch.testing.assert_close(linear_distillation(hidden, weight, *teacher, labels, **keywords), expected, **TIGHT)


def test_tensor_options_do_not_recompile():
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
def test_scalar_option_errors(name):
    keywords, kind, message = BAD[name]
    with pytest.raises(kind, match="^" + message):
        linear_cross_entropy(*problem(), **keywords)


def test_dtensor_options(mesh):
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


def test_values_are_read_on_cpu_alone():
    """Numbers are looked at in eager CPU code alone."""
    assert numbers.can_read_values(torch.zeros(1)) and not numbers.can_read_values(torch.zeros(1, device="meta"))
