"""Tiny random models of any class of `transformers`, and their loss and gradients in fp32 and in fp64."""

from contextlib import contextmanager
from typing import NamedTuple

import torch
from family_configs import tiny
from family_sizes import UNINITIALISED, H, V
from torch.overrides import TorchFunctionMode

EPS = torch.finfo(torch.float32).eps


class Computed(NamedTuple):
    """A loss, its gradients by parameter, None where it does not depend on one, and the logits of the output."""

    loss: torch.Tensor
    gradients: dict
    logits: object


def build(kind, given):
    """A tiny random model in training mode whose logits spread, so that all that is done to them matters."""
    torch.manual_seed(0)
    config = tiny(kind.config_class, **given)
    if config.is_encoder_decoder or "EncoderDecoder" in type(config).__name__:
        for name, token in (("decoder_start_token_id", 2), ("pad_token_id", 0)):
            if getattr(config, name, None) is None:
                setattr(config, name, token)
    model = kind(config)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if V in tensor.shape and tensor.is_floating_point() and (tensor.dim() > 1 or "bias" in name):
                tensor.normal_(0, 2 / H**0.5)
            elif UNINITIALISED.get(kind.__name__, "nothing") in name:
                tensor.normal_(0, 0.02)
    return model.train()


def compute(model, arguments):
    torch.manual_seed(0)
    output = model(**arguments)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(output.loss, list(named.values()), allow_unused=True)
    found = dict(zip(named, gradients, strict=True))
    return Computed(output.loss.detach(), found, getattr(output, "logits", None))


class InFp64(TorchFunctionMode):
    """What is written as fp32 is computed in fp64: casts, softmaxes, norms and losses."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.float:
            function = torch.Tensor.double
        args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        return function(*args, **kwargs)


@contextmanager
def in_fp64():
    torch.set_default_dtype(torch.float64)
    try:
        with InFp64():
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def truth(model, arguments):
    """The loss and gradients of this model, which is spent, in fp64."""
    arguments = {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in arguments.items()}
    model.double()
    for module in model.modules():
        if getattr(module, "_can_set_experts_implementation", bool)():
            module.set_experts_implementation("eager")  # grouped GEMMs have no fp64
    with in_fp64():
        return compute(model, arguments)


def shake(model, seed):
    """This model with parameters that differ by half a rounding."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + EPS * torch.randint(0, 2, parameter.shape, generator=random))
    return model
