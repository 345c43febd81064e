"""What one may do around fused heads without another number: aliases, nested calls, shared heads, wrapped forwards."""

import gc
import operator
import weakref
from functools import partial

import numpy as np
import pytest
import torch
from fused_models import B, Model, S, V, aligned, batch, causal, step

from compiled_loss.integrations.transformers import DeferredLogits, fuse_head, unfuse_head
from compiled_loss.integrations.transformers.deferring import deferring


def own_and_fused(finish):
    losses = []
    for fuse in (lambda model: None, fuse_head):
        model = Model(finish)
        fuse(model)
        losses.append(step(model)[0]["loss"])
    return losses


def test_logits_changed_in_place():
    def changed(model, logits, labels):
        scaled = logits.to(torch.float64)
        scaled /= 4
        return aligned(scaled, labels)

    torch.testing.assert_close(*own_and_fused(changed), rtol=1e-12, atol=0)


@pytest.mark.parametrize("alias", [lambda v: v.contiguous(), lambda v: v.view(-1, V), lambda v: v[:, 1:]])
def test_an_alias_of_logits_changed_in_place(alias):
    def changed(model, logits, labels):
        other = alias(logits)
        other *= 3
        return aligned(logits, labels)

    model = Model(changed)
    fuse_head(model)
    with pytest.raises((AttributeError, TypeError), match=r"got Model, which also does a change in place, and then "):
        step(model)


def test_a_bias_where_the_classes_are_second():
    def added(model, logits, labels):
        return torch.nn.functional.cross_entropy(logits[:, :S].transpose(1, 2) + torch.zeros(S), labels)

    model = Model(added)
    fuse_head(model)
    with pytest.raises(TypeError, match=r"which also does a sum of \[B, V, \.\.\.\]"):
        step(model)


def test_lists_of_logits():
    def stacked(model, logits, labels):
        return aligned(torch.cat([logits]), labels)

    model = Model(stacked)
    fuse_head(model)
    with pytest.raises(TypeError, match="got Model, which also does cat"):
        step(model)
    model = Model(causal)
    fuse_head(model)
    logits = step(model)[0]["logits"]
    uses = [lambda: torch.stack([logits]), lambda: np.array(logits), lambda: bool(logits), lambda: -logits]
    uses += [lambda compare=compare: compare(logits, 3) for compare in (operator.eq, operator.lt, operator.sub)]
    for use in uses:
        with pytest.raises(TypeError, match=r"^logits: expected no use of a training step's"):
            use()


def test_a_head_that_two_models_share():
    first, second = Model(causal), Model(causal)
    second.lm_head = first.lm_head
    fuse_head(first)
    with pytest.raises(ValueError, match="expected a head that no other fused model has"):
        fuse_head(second)
    unfuse_head(first)
    fuse_head(second)
    step(second)


def test_fused_again_where_another_has_wrapped_the_forward():
    model = Model(causal)
    fuse_head(model)
    ours = model.forward
    model.forward = partial(ours)  # as Accelerate does for autocast
    for _ in range(2):
        assert isinstance(step(model)[0]["logits"], DeferredLogits)
        unfuse_head(model)
        assert isinstance(step(model)[0]["logits"], torch.Tensor)
        fuse_head(model, statistics=("entropy",))
    assert step(model)[0]["logits"].statistics.entropy.shape == (B, S)
    assert not hasattr(ours, "__wrapped__")  # by which Accelerate would take it off


def test_a_call_within_a_call():
    model, seen = Model(causal), []

    def look(*_call):
        if not seen:
            seen.append(None)
            with torch.no_grad():
                seen.append(model(batch()[0])["logits"])

    fuse_head(model)
    model.embedding.register_forward_hook(look)
    assert isinstance(step(model)[0]["logits"], DeferredLogits)
    assert isinstance(seen[1], torch.Tensor)


def test_nothing_is_kept_without_a_collection():
    """By a cycle, that is, until Python looks for those."""
    model, hidden = Model(causal), []
    model.embedding.register_forward_hook(lambda module, args, output: hidden.append(weakref.ref(output)))
    gc.collect()
    gc.disable()
    try:
        with deferring(model):
            model(batch()[0])["logits"][:, 1:].apply(lambda states, weight, **_keywords: (states @ weight.t()).sum())
        fuse_head(model)
        step(model)
        assert [reference() for reference in hidden] == [None, None]
    finally:
        gc.enable()
