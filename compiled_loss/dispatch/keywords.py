"""The keywords of losses of labels, in one record for all of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from compiled_loss import checks
from compiled_loss import reduction as reductions
from compiled_loss.checks import numbers
from compiled_loss.distributed import dtensor
from compiled_loss.distributed.vocab_shard import VocabShard, Vocabulary
from compiled_loss.engine import user_losses
from compiled_loss.engine.gemm import opaque_copy
from compiled_loss.engine.math.row_losses import Named
from compiled_loss.engine.math.statistics import statistics_dtype
from compiled_loss.engine.traced_losses import Input, Signature
from compiled_loss.engine.transforms import traced
from compiled_loss.planner.chunking import Chunking

UNCHUNKED = Chunking()  # passed by losses of logits that exist already


class Keywords(NamedTuple):
    """The keywords that a loss was called with.

    A loss without some keyword leaves it at the value that changes nothing.
    """

    chunking: Chunking  # no default: Dynamo 2.11 does not support an object as a default
    bias: Tensor | None = None
    mask: Tensor | None = None
    token_weights: Tensor | None = None
    class_weights: Tensor | None = None
    ignore_index: int = -100
    label_smoothing: float | Tensor = 0.0
    z_loss: float | Tensor = 0.0
    softcap: float | Tensor | None = None
    logit_scale: float | Tensor = 1.0
    temperature: float | Tensor = 1.0
    shift: int = 0
    reduction: str = "sum"
    num_label_tokens: int | Tensor | None = None
    vocab_shard: VocabShard | None = None
    compile: bool | Literal["auto"] = "auto"
    mask_weighs: bool = True  # False if it only tells which tokens count
    token_loss: Callable[..., Tensor] | None = None  # the user's own
    inputs: tuple[Any, ...] = ()  # of the token loss: one value per token, or a number
    kept_ids: Tensor | None = None  # [..., K], the classes that a sampler kept
    ids: Tensor | None = None  # [..., K] or [K], the classes whose log-probabilities are asked for
    top_k: int | None = None
    token_temperature: Tensor | None = None  # the value of `temperature` if tokens have their own
    of_logits: bool = False  # whether the token loss takes a token's logits instead of its statistics

    def checked(self) -> Keywords:
        """Returns the keywords with numbers as numbers. Raises an error if one is out of its range.

        Tensors of numbers are checked elsewhere.
        """
        checks.instance("chunking", self.chunking, Chunking)
        checks.chunking.compiles(self.compile)
        checks.reduction(self.reduction)
        temperature, by_token = self.temperature, self.token_temperature
        if isinstance(temperature, Tensor) and checks.temperatures.of_tokens(temperature):
            by_token, temperature = temperature, 1.0
        softcap, temperature = checks.transform(self.softcap, temperature)
        label_smoothing, z_loss = checks.terms(self.label_smoothing, self.z_loss)
        shift, ignore_index = checks.alignment(self.shift, self.ignore_index, 1)
        if self.token_loss is not None:
            checks.functions.function("logits_loss" if self.of_logits else "token_loss", self.token_loss)
        return self._replace(
            softcap=softcap,
            logit_scale=checks.positive("logit_scale", self.logit_scale),
            temperature=temperature,
            token_temperature=by_token,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            shift=shift,
            ignore_index=ignore_index,
            num_label_tokens=checks.count(self.num_label_tokens, self.reduction),
        )

    def check_tensors(self, shape: torch.Size, part: Vocabulary, device: torch.device) -> None:
        """Raises an error unless tensors fit the vocabulary, and labels of which a rank has this shape."""
        if self.token_temperature is not None:
            dtensor.check_rows("temperature", self.token_temperature)
            own = dtensor.own_shape(self.token_temperature, part)
            checks.temperatures.given(self.token_temperature, own, shape, device)
        for name, value in (("mask", self.mask), ("token_weights", self.token_weights)):
            if value is not None:
                checks.tensor(name, value)
                dtensor.check_rows(name, value)
                checks.per_token(name, value, dtensor.own_shape(value, part), shape, device)
        for i, value in enumerate(self.inputs):
            checks.functions.given(f"inputs[{i}]", value)
            if isinstance(value, Tensor) and value.dim():
                dtensor.check_rows(f"inputs[{i}]", value)
                checks.functions.of_tokens(f"inputs[{i}]", value, dtensor.own_shape(value, part), shape, device)
        for name, value in (("kept_ids", self.kept_ids), ("ids", self.ids)):
            if value is not None:
                checks.tensor(name, value)
                dtensor.check_rows(name, value)
                checks.ids.given(name, value, dtensor.own_shape(value, part), shape, device, shared=name == "ids")
        checks.ids.top(self.top_k, part.size)
        checks.class_weights(self.class_weights, part.size, device)
        checks.count_device(self.num_label_tokens, device)
        checks.shift_fits(self.shift, len(shape))
        checks.sharding.token_mesh_dims(self.reduction, part.token_mesh_dims)

    def own(self, labels: Tensor, part: Vocabulary) -> tuple[Tensor, Keywords]:
        """Returns the labels and the keywords of this rank."""
        of_tokens = (self.mask, self.token_weights, self.token_temperature)
        mask, token_weights, temperature = (None if v is None else dtensor.rows(v, part) for v in of_tokens)
        if mask is not None and not self.mask_weighs:
            mask = mask != 0
        labels = dtensor.rows(labels, part)
        kept_ids, ids = (None if v is None else dtensor.rows(v, part) for v in (self.kept_ids, self.ids))
        return labels, self._replace(
            mask=mask,
            token_weights=token_weights,
            token_temperature=temperature,
            inputs=tuple([dtensor.rows(v, part) if isinstance(v, Tensor) else v for v in self.inputs]),
            kept_ids=kept_ids,
            ids=ids,
            class_weights=dtensor.whole(self.class_weights),
            num_label_tokens=dtensor.whole(self.num_label_tokens),
        )

    def tokens(self, labels: Tensor, vocab: int | None, dtype: torch.dtype) -> reductions.Tokens:
        """Returns the tokens that count, with their weights."""
        return reductions.tokens(
            labels,
            self.mask,
            self.token_weights,
            ignore_index=self.ignore_index,
            shift=self.shift,
            vocab=vocab,
            dtype=dtype,
        )

    def named(self, dims: int, dtype: torch.dtype, device: torch.device, vocab: int) -> Named | None:
        """Returns the user's loss as the token strategy takes it; None if it cannot.

        `dims` is the number of dimensions of the tokens, [...].
        """
        if self.token_loss is None or traced() or not user_losses.may_be_named(self.token_loss):
            return None
        enabled, wide = torch.is_grad_enabled(), statistics_dtype(dtype)
        inputs = []
        for value in self.inputs:
            if isinstance(value, Tensor) and value.dim():
                shape = tuple([len(range(n)) for n in value.shape[dims:]])  # numbers instead of symbols
                inputs.append(Input(value.dtype, shape, enabled and value.requires_grad))
            else:
                inputs.append(Input(wide, None, wants_gradient=False))
        mask = self.mask if self.mask_weighs else None
        weights = [v for v in (mask, self.token_weights) if v is not None and v.dtype != torch.bool]
        weight = enabled and any([v.requires_grad for v in weights])
        of = vocab if self.of_logits else None
        signature = Signature(tuple(inputs), wide, device, len(weights) > 0, weight, of)
        return user_losses.named(self.token_loss, signature)

    def inverse_temperature(self, tokens: reductions.Tokens, dtype: torch.dtype) -> Tensor | None:
        """Returns 1 / temperature of each token [...] that has its own; NaN where a temperature is not above 0."""
        if self.token_temperature is None:
            return None
        active, temperature = tokens.active, self.token_temperature.detach().to(statistics_dtype(dtype))
        if numbers.can_read_values(temperature):
            checks.temperatures.positive(temperature.expand(active.shape)[active])
        inverse = torch.where(temperature > 0, temperature, math.nan).reciprocal()
        return torch.where(active, inverse, 1.0)

    def scales(self, like: Tensor) -> Tensor | None:
        """Returns the `scales` of the engine's `Head`."""
        return scales(like, self.softcap, self.logit_scale, self.temperature)


def scales(like: Tensor, softcap: Any, logit_scale: Any, temperature: Any) -> Tensor | None:
    """Returns the `scales` of the engine's `Head`, in the dtype of statistics."""
    if softcap is None and numbers.known(logit_scale, 1) and numbers.known(temperature, 1):
        return None
    # Products with a number, not torch.full. If a number changes from step to step, the compiler makes it an input only
    # where it meets a tensor in arithmetic. Elsewhere it recompiles for every value.
    one = torch.ones((), dtype=statistics_dtype(like.dtype), device=like.device)
    outer: Tensor = one * (logit_scale if softcap is None else softcap) / temperature
    if softcap is None:
        return outer
    both = torch.stack((one * logit_scale / softcap, outer))
    # Opaque: otherwise Inductor counts the operands of both among the reads of a logit, and writes out an [N, V].
    return opaque_copy(both, []) if torch.compiler.is_compiling() and not traced() else both
