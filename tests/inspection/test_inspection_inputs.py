"""Descriptions of inputs and names of functions."""

import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import compiled_loss
from compiled_loss.inspection import InspectionError
from compiled_loss.inspection.call import TensorSpec, find_function, parse_inputs
from compiled_loss.nn import LinearCrossEntropy


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("f64[2]", TensorSpec(shape=(2,), dtype=torch.float64)),
        ("f32[8,4]", TensorSpec(shape=(8, 4), dtype=torch.float32)),
        ("fp32[8,4]", TensorSpec(shape=(8, 4), dtype=torch.float32)),
        ("float32[8,4]", TensorSpec(shape=(8, 4), dtype=torch.float32)),
        ("f16[1]", TensorSpec(shape=(1,), dtype=torch.float16)),
        ("fp16[1]", TensorSpec(shape=(1,), dtype=torch.float16)),
        ("half[1]", TensorSpec(shape=(1,), dtype=torch.float16)),
        ("bf16[8, 4 ]:grad", TensorSpec(shape=(8, 4), dtype=torch.bfloat16, grad=True)),
        ("bfloat16[8,4,]", TensorSpec(shape=(8, 4), dtype=torch.bfloat16)),
        ("i64[3]:0..131071", TensorSpec(shape=(3,), dtype=torch.int64, high=131071)),
        ("int64[3]:-100..-1", TensorSpec(shape=(3,), dtype=torch.int64, low=-100, high=-1)),
        ("i32[3]", TensorSpec(shape=(3,), dtype=torch.int32)),
        ("uint8[3]", TensorSpec(shape=(3,), dtype=torch.uint8)),
        ("bool[3]", TensorSpec(shape=(3,), dtype=torch.bool)),
        ("f32[]", TensorSpec(shape=(), dtype=torch.float32)),
        ("f32[ ]:grad", TensorSpec(shape=(), dtype=torch.float32, grad=True)),
        ("f32[0,4]", TensorSpec(shape=(0, 4), dtype=torch.float32)),
        ("float8_e4m3fn[2]", TensorSpec(shape=(2,), dtype=torch.float8_e4m3fn)),
    ],
)
def test_spec_round_trip(text, expected):
    spec = TensorSpec.parse(text)
    assert spec == expected
    assert TensorSpec.parse(str(spec)) == spec


@pytest.mark.parametrize(("text", "written"), [("fp32[2,3]:grad", "f32[2,3]:grad"), ("i64[4]:1..5", "int64[4]:1..5")])
def test_spec_is_normalised(text, written):
    assert str(TensorSpec.parse(text)) == written


@pytest.mark.parametrize(
    "text",
    [
        *("", "f32", "[2]", "f32[2", "f32[a]", "f32[-1]", "f32(2)", "f32[2]grad", "f32[2]:", "f32[2] :grad", "f33[2]"),
        *(
            "tensor[2]",
            "nn[2]",
            "f32[2]:0..5",
            "f32[2]:gard",
            "i64[2]:grad",
            "bool[2]:grad",
            "i64[2]:1..",
            "i64[2]:1...5",
        ),
        *("f32[2,,3]", "f32[2 3]", "f32[,]", "i64[2]:5..3"),
    ],
)
def test_invalid_spec(text):
    with pytest.raises(ValueError, match=rf"^inputs: expected .*, got {re.escape(repr(text))}$"):
        TensorSpec.parse(text)


@pytest.mark.parametrize(
    ("tensor", "spec"),
    [
        (torch.zeros(2, 3, requires_grad=True), TensorSpec(shape=(2, 3), dtype=torch.float32, grad=True)),
        (torch.zeros(3, 2).t(), TensorSpec(shape=(2, 3), dtype=torch.float32, stride=(1, 2))),
        (torch.zeros(2, 6)[:, ::2], TensorSpec(shape=(2, 3), dtype=torch.float32, stride=(6, 2))),
        (torch.zeros(2, 1).expand(2, 3), TensorSpec(shape=(2, 3), dtype=torch.float32, stride=(1, 0))),
        (torch.tensor([4, -100, 3]), TensorSpec(shape=(3,), dtype=torch.int64, high=4)),  # ignored is no label
        (torch.tensor([4, 2, 3]), TensorSpec(shape=(3,), dtype=torch.int64, low=2, high=4)),
        (torch.tensor([True, True]), TensorSpec(shape=(2,), dtype=torch.bool, low=1, high=1)),
        (torch.tensor([], dtype=torch.int32), TensorSpec(shape=(0,), dtype=torch.int32)),
        (torch.zeros(2, device="meta", dtype=torch.int64), TensorSpec(shape=(2,), dtype=torch.int64)),
        (torch.tensor(1j), TensorSpec(shape=(), dtype=torch.complex64)),
    ],
    ids=str,
)
def test_spec_of_a_tensor(tensor, spec):
    assert TensorSpec.of(tensor) == spec
    made = spec.make(torch.device("meta"), data=False)
    assert (made.shape, made.stride(), made.dtype) == (tensor.shape, tensor.stride(), tensor.dtype)
    assert made.requires_grad == tensor.requires_grad


def test_data_of_a_spec():
    make = partial(TensorSpec.make, device=torch.device("cpu"), data=True)
    labels = make(TensorSpec.parse("i64[1000]:-3..4"))
    assert set(labels.tolist()) == set(range(-3, 5))
    assert set(make(TensorSpec.parse("bool[100]")).tolist()) == {False, True}
    floats = make(TensorSpec.parse("bf16[100,100]:grad"))
    assert floats.requires_grad and floats.isfinite().all() and 0 < floats.std() < 1
    assert make(TensorSpec(shape=(50, 4), dtype=torch.float32, stride=(1, 50))).stride() == (1, 50)
    assert make(TensorSpec.parse("f32[0,4]")).shape == (0, 4)


def test_inputs_of_the_command_line():
    text = "bf16[8, 4]:grad int64[8]:0..3 0.5 -1 True None 'mean' [1,2] f32[]"
    assert parse_inputs(text) == (
        TensorSpec(shape=(8, 4), dtype=torch.bfloat16, grad=True),
        TensorSpec(shape=(8,), dtype=torch.int64, high=3),
        *(0.5, -1, True, None, "mean", [1, 2]),
        TensorSpec(shape=(), dtype=torch.float32),
    )
    assert parse_inputs("") == parse_inputs(" \n") == ()


@pytest.mark.parametrize(("text", "word"), [("f32[2] mean", "mean"), ("f32[2]:0..1", "f32[2]:0..1"), ("(1,", "(1,")])
def test_invalid_inputs(text, word):
    with pytest.raises(ValueError, match=rf"^inputs: expected .*, got {re.escape(repr(word))}$"):
        parse_inputs(text)


def test_find_function():
    assert find_function("linear_cross_entropy") is compiled_loss.linear_cross_entropy
    assert find_function("torch.nn.functional:cross_entropy") is F.cross_entropy
    assert find_function("torch:nn.functional.cross_entropy") is F.cross_entropy
    assert find_function("compiled_loss.nn:LinearCrossEntropy") is LinearCrossEntropy


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nonsense", "has no attribute 'nonsense'"),
        ("", "''"),
        ("no_such_module:f", "No module named 'no_such_module'"),
        ("torch.no_such:f", "No module named 'torch.no_such'"),
        ("torch:nn.no_such", "no_such"),
        ("compiled_loss:__version__", "str is not callable"),
        ("torch.nn.functional.cross_entropy", "has no attribute"),
    ],
)
def test_find_function_errors(name, reason):
    with pytest.raises(InspectionError, match=rf"^function: expected .*, got '{name}': .*{reason}"):
        find_function(name)
