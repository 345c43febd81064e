"""fuse_head and unfuse_head: when a model has logits, what is left of them, what is restored, and what is refused."""

import copy
import inspect

import pytest
import torch
from comparing import TIGHT
from fused_models import B, H, Model, Outer, S, V, aligned, batch, causal, label_smoother, shifted, step, z_loss
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from compiled_loss import Chunking
from compiled_loss.integrations.transformers import DeferredLogits, fuse_head, unfuse_head


def test_a_loss_of_something_else_is_an_error():
    def hidden_loss(model, logits, labels):
        return model.embedding.weight.square().mean()

    def without_head(self, input_ids, labels=None):
        return {"loss": (self.embedding(input_ids) @ self.lm_head.weight.t()).logsumexp(-1).mean()}

    model = Model(hidden_loss)
    fuse_head(model)
    with pytest.raises(RuntimeError, match=r"^model: expected a loss that is cross_entropy of .* got Model, which c"):
        step(model)
    model = type("Other", (Model,), {"forward": without_head})(causal)
    fuse_head(model)
    with pytest.raises(RuntimeError, match=r"^model: expected a forward that calls the head .* got Other's, which"):
        step(model)
    model = Model(causal)
    fuse_head(model)
    model.lm_head = torch.nn.Linear(H, V, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"or whose head was replaced since \(by peft, resize_token_embeddings or"):
        step(model)


def test_logits_explain_themselves_after_the_step():
    model = Model(causal)
    fuse_head(model)
    output, _ = step(model)
    logits = output["logits"]
    text = r"^logits: expected no use of a training step's, which fuse_head\(model\) does not compute, got "
    for name, use in {
        "shape": lambda: logits.shape,
        "argmax": lambda: logits.argmax(-1),
        "view": lambda: logits.view(-1, V),
        "an index": lambda: logits[0],
        "arithmetic": lambda: 2 * logits,
        "softmax": lambda: torch.softmax(logits, -1),
    }.items():
        with pytest.raises((AttributeError, TypeError), match=f"{text}{name}: call the model without labels"):
            use()
    assert logits.to("cpu") is logits  # as Accelerate moves what it finds in an output
    assert not hasattr(logits, "detach") and logits.statistics is None and repr(logits) == "DeferredLogits of Model"
    reached = [value for value in vars(logits).values() if isinstance(value, (torch.Tensor, torch.nn.Module))]
    assert not reached and not logits._call.made and logits._call.module is None


def test_logits_are_there_outside_of_training():
    model, (ids, labels) = Model(causal), batch()
    expected = model(ids, labels)
    fuse_head(model)
    outputs = [model(ids), model.eval()(ids, labels)]
    model.train()
    with torch.no_grad():
        outputs += [model(ids, labels), model(ids, labels=labels)]
    for output in outputs:
        assert torch.equal(output["logits"], expected["logits"])
        assert output["loss"] is None or torch.equal(output["loss"], expected["loss"])
    assert isinstance(model(ids, labels)["logits"], DeferredLogits)  # by position


def test_unfuse_head_restores_everything():
    model = Model(causal)
    before = [dict(vars(module)) for module in model.modules()]
    expected = step(model)[0]["logits"]
    fuse_head(model)
    with pytest.raises(ValueError, match=r"^model: expected one whose head is not fused, got Model: unfuse_head\("):
        fuse_head(model)
    assert inspect.signature(model.forward) == inspect.signature(Model(causal).forward)  # the Trainer reads it
    assert list(model.state_dict()) == list(Model(causal).state_dict())
    unfuse_head(model)
    assert [dict(vars(module)) for module in model.modules()] == before
    assert torch.equal(step(model)[0]["logits"], expected)
    with pytest.raises(ValueError, match=r"^model: expected one that fuse_head was called with, got Model$"):
        unfuse_head(model)


def test_forwards_that_stood_on_instances():
    """One before, as Accelerate's hooks, is called and comes back; one after, as its autocast, stays."""
    model, called = Model(causal), []

    def before(*args, **kwargs):
        called.append("before")
        return Model.forward(model, *args, **kwargs)

    model.forward = before
    fuse_head(model)
    fused = model.forward

    def after(*args, **kwargs):
        called.append("after")
        return fused(*args, **kwargs)

    step(model)
    model.forward = after
    assert isinstance(step(model)[0]["logits"], DeferredLogits)
    unfuse_head(model)
    assert isinstance(step(model)[0]["logits"], torch.Tensor)
    assert called == ["before", "after", "before", "after", "before"]
    model = Model(causal)
    model.forward = before
    fuse_head(model)
    unfuse_head(model)
    assert model.forward is before


def test_a_copy_computes_its_own_loss():
    model = Model(causal)
    fuse_head(model)
    twin = copy.deepcopy(model)
    _, expected = step(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    _, found = step(twin)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    unfuse_head(model)
    assert isinstance(step(twin)[0]["logits"], DeferredLogits)
    assert isinstance(step(model)[0]["logits"], torch.Tensor)


def test_statistics_of_the_same_pass():
    model, (ids, labels) = Model(causal), batch()
    log_probs = model(ids)["logits"].detach().log_softmax(-1)
    fuse_head(model, statistics=("entropy", "correct", "logprob"))
    found = step(model)[0]["logits"].statistics
    targets = F.pad(labels, (0, 1), value=-100)[:, 1:]
    valid = targets != -100
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    torch.testing.assert_close(found.entropy, entropy.where(valid, 0), **TIGHT)
    assert torch.equal(found.correct, (log_probs.argmax(-1) == targets) & valid)
    logprob = log_probs.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(found.logprob, logprob.where(valid, 0), **TIGHT)
    assert found.logsumexp is None and not found.logprob.requires_grad
    unfuse_head(model)
    with pytest.raises(ValueError, match=r"^wanted: expected some of 'logprob', .* got 'mean_logit'"):
        fuse_head(model, statistics=("mean_logit",))
    model = Model(shifted)
    fuse_head(model, statistics=["entropy"])  # of the positions that it keeps
    assert step(model)[0]["logits"].statistics.entropy.shape == (B * (S - 1),)


@pytest.mark.parametrize("finish", [causal, shifted, z_loss, label_smoother])
def test_nothing_as_large_as_the_logits(finish):
    """With chunks of 2 rows or columns: of those that the model, the loss and their backward make."""

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                self.size = max(self.size, result.untyped_storage().nbytes() // result.element_size())
            return result

    sizes = []
    for strategy in (None, "vocab"):
        model = Model(finish)
        if strategy is not None:
            fuse_head(model, chunking=Chunking(strategy=strategy, chunk_size=2))
        with Largest() as largest:
            step(model)
        sizes.append(largest.size)
    assert sizes[0] >= (S - 1) * B * V > sizes[1]


class NoHead(Model):
    def get_output_embeddings(self):
        return self.embedding


class NoLabels(Model):
    def forward(self, input_ids):
        return self.lm_head(self.embedding(input_ids))


class Cubed(torch.nn.Linear):
    def forward(self, hidden):
        return super().forward(hidden) ** 3


def another_head(model):
    model.lm_head = Cubed(H, V)
    return model


def hooked(model):
    model.lm_head.register_forward_hook(lambda module, args, output: output)
    return model


def test_a_head_with_further_arguments_is_an_error():
    def forward(self, input_ids, labels=None):
        return {"loss": aligned(self.lm_head(self.embedding(input_ids), adapter_names=["a"]), labels)}

    model = type("Mixed", (Model,), {"forward": forward})(causal)
    fuse_head(model)
    with pytest.raises(
        TypeError, match=r"alls its head with hidden states alone, got Linear called with adapter_names: "
    ):
        step(model)


def test_the_head_of_a_model_inside():
    expected, model = step(Model(causal)), Outer(Model(causal))
    fuse_head(model)
    output, gradients = step(model)
    torch.testing.assert_close(output["loss"], expected[0]["loss"], **TIGHT)
    torch.testing.assert_close(gradients, expected[1], rtol=1e-10, atol=1e-12)
    with pytest.raises(
        TypeError, match=r" returns the Linear that gives its logits, got Outer with Linear and Linear:"
    ):
        fuse_head(Outer(Model(causal), Model(causal)))
    with pytest.raises(TypeError, match=r" returns the Linear that gives its logits, got Outer with none:"):
        fuse_head(Outer())


def test_models_that_cannot_be_fused():
    for model, text in {
        NoHead(
            causal
        ): r"^model: expected one of transformers, whose get_output_embeddings.* got NoHead with Embedding",
        NoLabels(causal): "^model: expected one of transformers whose forward takes labels, got NoLabels",
        another_head(
            Model(causal)
        ): r"^model\.get_output_embeddings\(\): expected a head .* which has a forward of its",
    }.items():
        with pytest.raises(TypeError, match=text):
            fuse_head(model)
        assert not [module for module in model.modules() if "forward" in vars(module)]
    with pytest.raises(TypeError, match=r"^chunking: expected a Chunking, got"):
        fuse_head(Model(causal), chunking=4)
    model = hooked(Model(causal))
    fuse_head(model)  # as one may be when it is not there any more
    with pytest.raises(ValueError, match=r"^model\.get_output_embeddings\(\): expected a head .* with the hook hooked"):
        step(model)
