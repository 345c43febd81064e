"""Functions of a user, to inspect: the child process imports them by name. Lines that tests look for have a mark."""

import gc
import os
import sys
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ON_CPU = torch.linspace(0, 1, 1000)


def twice(x):
    return x * 2


def product(a, b):
    return a @ b


def linear_logsumexp(hidden, weight):
    return (hidden @ weight.t()).logsumexp(-1)


def linear_cross_entropy(hidden, weight, labels):
    return F.cross_entropy(hidden @ weight.t(), labels)


def layers(a, b, c):
    x = (a @ b).relu()
    x = (x @ c).relu()
    x = (x @ c).relu()
    return x @ c


def same_shape(x):
    return x.exp()


class Two(NamedTuple):
    wave: Tensor
    total: Tensor


def two(x):
    return Two(x.sin(), x.sum())


def several(x):
    return x.exp(), 3, None, {"of": [x.sum()]}


def scaled(x, factor, power, *, negative=False):
    y = x.exp() * factor + power
    return -y if negative else y


def checkpointed(hidden, weight):
    return torch.utils.checkpoint.checkpoint(linear_logsumexp, hidden, weight, use_reentrant=False)


def in_place(x):
    x.add_(1)
    return x


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(32, 64)
        self.down = nn.Linear(64, 8, bias=False)
        self.register_buffer("offset", torch.zeros(8))

    def forward(self, x):
        return self.down(self.up(x).relu()) + self.offset


RANDOM = nn.Linear(8, 8), nn.Embedding(9, 4), nn.Conv1d(2, 2, 3), nn.LSTM(4, 4), nn.MultiheadAttention(8, 2)


def initialised(x):
    return _initialised(x)


@torch._dynamo.disable
def _initialised(x):
    """Every way of torch to draw numbers, on tensors of the device and of the CPU."""
    for tensor in (torch.empty_like(x), torch.empty(64, 32)):
        for draw in (
            nn.init.uniform_,
            nn.init.normal_,
            nn.init.trunc_normal_,
            nn.init.xavier_uniform_,
            nn.init.xavier_normal_,
            nn.init.kaiming_uniform_,
            nn.init.kaiming_normal_,
            nn.init.orthogonal_,
        ):
            draw(tensor)
        nn.init.sparse_(tensor, 0.5)
        for name in ("exponential_", "geometric_", "cauchy_", "log_normal_", "bernoulli_", "random_"):
            getattr(tensor, name)(*[0.5] * (name == "geometric_"))
        for like in (torch.rand_like, torch.randn_like, torch.bernoulli, torch.poisson, F.dropout):
            like(tensor)
        torch.randint(9, (4,), device=tensor.device)
        torch.randperm(9, device=tensor.device)
        torch.multinomial(tensor.abs(), 3)
    return x * 2


@torch._dynamo.disable
def _until(x):
    while (x > 1).any():
        x = x / 2
    return x


def until(x):
    return _until(x) * 2


class Raises:
    """A function whose import raises where it arrives."""

    def __reduce__(self):
        return _of_mine, ()


def _of_mine():
    raise ZeroDivisionError("of mine")


# Breaks, synchronisation, transfers ---------------------------------------------------------------------------------


def broken(x):
    y = x * 2
    torch._dynamo.graph_break()  # MARK broken
    return y.sin()


def asks(x):
    if x.sum().item() > 0:  # MARK asks
        return x * 2
    return x * 3


def chosen(x, mask):
    return x[mask].sum()  # MARK chosen


def brings_constant(x):
    return (x * ON_CPU.to(x.device)).sum()


def small_constant(x):
    return x * torch.tensor([1.0, 2.0, 3.0], device=x.device)


def long_constant(x):
    return x * torch.tensor([float(i) for i in range(100)], device=x.device)


@torch._dynamo.disable
def _in_python(x, index):
    y = x[index].cumsum(0)
    y = F.embedding(index, y).log_softmax(-1)
    return torch.minimum(y, y.logsumexp(0)).argmax(-1)


def in_python(x, index):
    return _in_python(x, index) + 1


@torch._dynamo.disable
def _litter(x):
    gc.collect()  # what the call before left
    cycle = [x]
    cycle.append(cycle)


def litters(x):
    y = x * 2
    _litter(y)
    return x.sum()


def raises(x):
    y = x.sin()
    raise KeyError(f"mine, {y.dim()}")  # MARK raises


def does_not_fit(x, w):
    y = x.sin()
    return y @ w  # MARK does_not_fit


def exits(x):
    sys.exit(3)


@torch._dynamo.disable
def _ends():
    print("last words", flush=True)
    os._exit(7)


def ends(x):
    _ends()
    return x


# Operators written in Python ----------------------------------------------------------------------------------------

CHUNK = 16


@torch.library.custom_op("inspected_functions::chunked", mutates_args=())
def chunked(hidden: Tensor, weight: Tensor) -> Tensor:
    result = hidden.new_empty(hidden.shape[0])
    for i in range(0, hidden.shape[0], CHUNK):
        z = torch.mm(hidden[i : i + CHUNK], weight.t())
        result[i : i + CHUNK] = z.amax(-1)
        del z
    return result


@chunked.register_fake
def _(hidden, weight):
    return hidden.new_empty(hidden.shape[0])


@torch.library.custom_op("inspected_functions::chunked_backward", mutates_args=())
def chunked_backward(hidden: Tensor, weight: Tensor, gradient: Tensor) -> Tensor:
    return torch.mm(torch.mm(hidden, weight.t()) * gradient[:, None], weight)


@chunked_backward.register_fake
def _(hidden, weight, gradient):
    return torch.empty_like(hidden)


chunked.register_autograd(
    lambda ctx, gradient: (chunked_backward(*ctx.saved_tensors, gradient), None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


@torch.library.custom_op("inspected_functions::composite", mutates_args=())
def composite(hidden: Tensor, weight: Tensor) -> Tensor:
    return F.linear(hidden, weight).amax(-1)


@composite.register_fake
def _(hidden, weight):
    return hidden.new_empty(hidden.shape[0])


_compiled = torch.compile(linear_logsumexp)


@torch.library.custom_op("inspected_functions::compiled_inside", mutates_args=())
def compiled_inside(hidden: Tensor, weight: Tensor) -> Tensor:
    return torch.cat([_compiled(part, weight) for part in hidden.split(CHUNK)])


@compiled_inside.register_fake
def _(hidden, weight):
    return hidden.new_empty(hidden.shape[0])


@torch.library.custom_op("inspected_functions::accumulate", mutates_args=("into",))
def accumulate(into: Tensor, x: Tensor) -> None:
    into += torch.mm(x, x.t())


def uses_chunked(hidden, weight):
    return chunked(hidden * 2, weight) * 2


def uses_composite(hidden, weight):
    return composite(hidden * 2, weight) * 2


def uses_compiled_inside(hidden, weight):
    return compiled_inside(hidden * 2, weight) * 2


def uses_accumulate(x):
    into = torch.zeros(x.shape[0], x.shape[0], device=x.device)
    accumulate(into, x)
    accumulate(into, x)
    return into * 2


# What a fake device must not answer differently from a real one ------------------------------------------------------


def autocast_product(a, b):
    with torch.autocast("cuda", dtype=torch.bfloat16):
        return a @ b


def attention(q):
    return F.scaled_dot_product_attention(q, q, q, is_causal=True)
