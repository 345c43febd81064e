"""The inspector takes any function: closures, modules, structures of inputs and results, autocast, options."""

import sys
from functools import partial

import inspected_functions as user
import pytest
import torch
import torch.nn.functional as F
from inspecting import HIDDEN, WEIGHT, H, N, V, alike, inspect, kinds
from torch import nn

from compiled_loss.inspection import InspectionError
from compiled_loss.inspection.call import TensorSpec

pytestmark = [
    pytest.mark.xdist_group("inspection"),  # one worker holds the children
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="GPU CODE IS NOT TESTED: it is generated on Linux"),
]


def test_tied_inputs():
    """As the weight of an embedding that is tied to a head: its gradients are added."""
    weight = torch.empty(V, H, device="meta", requires_grad=True)

    def tied(hidden, first, second):
        return hidden @ first.t() + hidden @ second.t()

    assert inspect(tied, HIDDEN, f"{WEIGHT}:grad", f"{WEIGHT}:grad").backward.kernels == {"mm": 2}
    assert inspect(tied, HIDDEN, weight, weight).backward.kernels == {"mm": 1, "addmm": 1}


def test_lambdas_closures_and_partials():
    factor = 3.0

    def closure(x):
        return (x * factor).exp()

    size = 64 * 64 * 4
    for fn in (lambda x: x.exp(), closure, partial(user.scaled, power=2, negative=True, factor=0.5)):
        found = inspect(fn, "f32[64,64]", backward=False)
        assert (kinds(found.forward), found.peak_bytes, found.breaks) == (["pointwise"], size, ())
    assert found.name == "partial"
    assert inspect(closure, "f32[4]", backward=False).name == "closure"


def test_module_and_its_parameters():
    size = 16 * 64 * 4
    found = inspect(user.Mlp(), "f32[16,32]")
    assert (found.name, found.inputs) == ("Mlp", ("f32[16,32]",))
    assert found.operations == 2 * 16 * 32 * 64 * 2 + 2 * 16 * 64 * 8 * 3  # x needs no gradient
    assert [s.shape for s in found.saved] == [(16, 64)]  # after relu
    assert found.backward.peak_bytes >= (32 * 64 + 64 + 64 * 8 + 16 * 8) * 4  # the gradients and the result
    assert found.forward.peak_bytes < 2 * size + 2 * 16 * 8 * 4
    frozen = inspect(user.Mlp().requires_grad_(False), "f32[16,32]:grad")
    assert frozen.operations == 2 * found.forward.operations
    alone = inspect(torch.no_grad()(user.Mlp()), "f32[16,32]", backward=False)
    assert alone.saved == () and alone.backward is None and alone.operations == found.forward.operations


def test_module_behind_a_method_or_partial():
    backward = 2 * 16 * 32 * 64 + 4 * 16 * 64 * 8
    mlp = user.Mlp()
    assert inspect(mlp.forward, "f32[16,32]").backward.operations == backward
    assert inspect(partial(mlp), "f32[16,32]").backward.operations == backward
    assert inspect(partial(F.linear, weight=mlp.up.weight), "f32[16,32]").backward.operations == 2 * 16 * 32 * 64


def test_module_in_a_closure():
    mlp = user.Mlp()
    assert inspect(lambda x: mlp(x).sum(), "f32[16,32]").backward.operations


def test_results_of_any_structure():
    size = 64 * 64 * 4
    found = inspect(user.two, "f32[64,64]:grad")
    assert found.forward.peak_bytes == size + 4
    assert len(found.backward.launches) == 1
    found = inspect(user.several, "f32[64,64]:grad")
    assert found.forward.peak_bytes == size + 4
    assert found.backward.launches[-1].written_bytes == size


@pytest.mark.parametrize("name", ["exp", "nothing"])
def test_without_backward(name):
    found = inspect({"exp": torch.exp, "nothing": lambda x: None}[name], "f32[8]", backward=False)
    assert found.backward is None and found.saved == () and found.passes == (found.forward,)


def test_tensors_as_inputs():
    text = inspect(user.two, "f32[64,64]:grad")
    for tensor in (torch.ones(64, 64, requires_grad=True), torch.ones(64, 64, device="meta", requires_grad=True)):
        assert alike(inspect(user.two, tensor), text)
    assert alike(inspect(user.two, TensorSpec.parse("f32[64,64]:grad")), text)


def test_strides_of_inputs():
    plain = inspect(torch.clone, "f32[64,32]", backward=False)
    strided = inspect(torch.clone, torch.empty(64, 128)[:, ::4], backward=False)
    assert plain.forward.launches[0].read_bytes == 64 * 32 * 4
    assert strided.forward.launches[0].read_bytes == (64 * 128 - 3) * 4  # from the first to the last element
    turned = inspect(torch.exp, torch.empty(32, 64).t(), backward=False)
    assert "(1, 64)" in turned.graphs[0].wrapper and "(1, 64)" not in plain.graphs[0].wrapper


def test_lists_of_tensors_and_numbers_are_inputs():
    def fn(parts, factor, *, name):
        return torch.cat(parts) * factor if name == "cat" else None

    tensors = [torch.ones(8, 4, requires_grad=True), torch.ones(2, 4, requires_grad=True)]
    found = inspect(partial(fn, name="cat"), tensors, 2.5)
    assert found.inputs[1] == "2.5"
    assert found.forward.peak_bytes == 10 * 4 * 4
    assert sum(launch.written_bytes for launch in found.backward.launches) == 10 * 4 * 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fn", "inputs"),
    [
        (nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), ["f32[2,16,32]:grad"]),
        (nn.Embedding(100, 16), ["i64[8,4]:0..99"]),
        (nn.Conv2d(3, 8, 3), ["f32[2,3,16,16]:grad"]),
        (partial(F.dropout, p=0.5), ["f32[8,4]:grad"]),
        (partial(torch.topk, k=3), ["f32[64,100]:grad"]),
        (torch.sort, ["f32[64,100]:grad"]),
        (torch.linalg.norm, ["f32[64,100]:grad"]),
        (nn.LSTM(8, 8), ["f32[4,2,8]:grad"]),
    ],
    ids=lambda v: type(v).__name__,
)
def test_functions_of_torch(fn, inputs):
    found = inspect(fn, *inputs)
    assert found.launches and found.backward.peak_bytes


def test_autocast():
    found = inspect(user.autocast_product, "f32[64,32]", "f32[32,100]", backward=False)
    assert {g.dtype for g in found.forward.gemms} == {"bfloat16"}


def test_inductor_options():
    narrow = inspect(torch.logsumexp, f"f32[{N},{V}]", 1, backward=False, options={"max_fusion_size": 1})
    plain = inspect(torch.logsumexp, f"f32[{N},{V}]", 1, backward=False)
    assert len(narrow.forward.launches) > len(plain.forward.launches)
    with pytest.raises(InspectionError, match="nonsense"):
        inspect(torch.exp, "f32[8]", backward=False, options={"nonsense": 1})


@pytest.mark.parametrize("name", ["max_autotune", "max_autotune_gemm"])
def test_max_autotune_error(name):
    with pytest.raises(InspectionError, match=rf"^options: expected none by which .*, got {name}: "):
        inspect(user.product, "f32[64,32]", "f32[32,100]", backward=False, options={name: True})
    assert inspect(user.product, "f32[64,32]", "f32[32,100]", backward=False, options={name: False}).launches == 1
