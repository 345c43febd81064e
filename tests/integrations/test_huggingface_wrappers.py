"""Models inside of PEFT, torch.compile and data parallelism, and classes of one's own."""

import pytest
import torch
from transformers_models import batch, llama, with_lora

from compiled_loss.huggingface import LinearCausalLMLoss, aligned_lm_loss, causal_lm_loss, set_loss_function

pytestmark = pytest.mark.xdist_group("transformers")


class Around(torch.nn.Module):
    """As DistributedDataParallel and DeepSpeed's engine hold a model, which they call by themselves."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


WRAPPERS = {
    "none": lambda model: model,
    "PEFT": lambda model: with_lora(model, target_modules=["q_proj"]),
    "torch.compile of PEFT": lambda model: torch.compile(with_lora(model, target_modules=["q_proj"]), backend="eager"),
    "parallel": Around,
    "parallel torch.compile": lambda model: Around(torch.compile(model, backend="eager")),
}


@pytest.mark.parametrize("which", WRAPPERS)
@torch.compiler.set_stance("force_eager")
def test_peft_compile_and_data_parallel_wrappers(which):
    """The loss is called, which it is not if it is set on the wrapper. Nothing is compiled: that takes seconds."""
    model = llama(num_hidden_layers=1)
    wrapped, (ids, labels) = WRAPPERS[which](model), batch()
    expected = wrapped(input_ids=ids, labels=labels).loss
    loss_fn = LinearCausalLMLoss(wrapped)
    torch.testing.assert_close(loss_fn(wrapped(input_ids=ids, **loss_fn.forward_keywords), labels), expected)
    set_loss_function(wrapped)
    assert model.loss_function is causal_lm_loss
    found = wrapped(input_ids=ids, labels=labels).loss
    torch.testing.assert_close(found, expected)
    assert "NllLoss" in names(expected) and "NllLoss" not in names(found)


def names(loss):
    """Of the autograd nodes behind a loss."""
    found, todo = set(), [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in found:
            found.add(node)
            todo += [after for after, _ in node.next_functions]
    return " ".join(node.name() for node in found)


def mine(logits, labels, vocab_size, **kwargs):
    return logits.sum()


def test_custom_loss_function_error():
    model = llama()
    model.loss_function = mine
    text = "^model: expected one whose loss_function is .* got LlamaForCausalLM, whose is "
    with pytest.raises(ValueError, match=text + "mine"):
        LinearCausalLMLoss(model)
    set_loss_function(model)  # replaces it
    assert model.loss_function is causal_lm_loss
    LinearCausalLMLoss(model)
    model.loss_function = aligned_lm_loss
    with pytest.raises(ValueError, match=text + "aligned_lm_loss"):
        LinearCausalLMLoss(model)


# Classes of one's own -----------------------------------------------------------------------------------------------


def subclass(forward):
    model = llama()
    model.__class__ = type("Own", (type(model),), {"forward": forward})
    return model


def renamed(this, *args, **kwargs):
    return type(this).__mro__[1].forward(this, *args, **kwargs)


def a_z_loss(self, *args, **kwargs):
    outputs = type(self).__mro__[1].forward(self, *args, **kwargs)
    if outputs.loss is not None:
        outputs.loss = outputs.loss + 0.1 * outputs.logits.logsumexp(-1).square().mean()
    return outputs


def smoothed(self, *args, labels=None, **kwargs):
    outputs = type(self).__mro__[1].forward(self, *args, **kwargs)
    if labels is not None:
        loss = torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        outputs["loss"] = loss
    return outputs


def of_other_logits(self, *args, labels=None, **kwargs):
    outputs = type(self).__mro__[1].forward(self, *args, **kwargs)
    if labels is not None:
        outputs.loss = self.loss_function(30 * torch.tanh(outputs.logits / 30), labels, self.vocab_size)
    return outputs


def a_balance(self, *args, labels=None, **kwargs):
    """As mixtures of experts, under another name."""
    outputs = type(self).__mro__[1].forward(self, *args, **kwargs)
    if labels is not None:
        balance_loss = outputs.logits.square().mean()
        loss = self.loss_function(outputs.logits, labels, self.vocab_size)
        outputs.loss = loss + self.config.initializer_range * balance_loss
    return outputs


def a_balance_that_is_not_returned(self, *args, labels=None, **kwargs):
    outputs = type(self).__mro__[1].forward(self, *args, **kwargs)
    if labels is not None:
        aux_loss = outputs.logits.square().mean()
        loss = self.loss_function(outputs.logits, labels, self.vocab_size)
        loss += self.config.initializer_range * aux_loss
        outputs.loss = loss
    return outputs


def aligned_already(self, *args, labels=None, **kwargs):
    outputs = type(self).__mro__[1].forward(self, *args, **kwargs)
    if labels is not None:
        outputs.loss = self.loss_function(outputs.logits, None, self.vocab_size, shift_labels=labels)
    return outputs


def returned(self, *args, labels=None, **kwargs):
    outputs = type(self).__mro__[1].forward(self, *args, **kwargs)
    return {"loss": 2 * self.loss_function(outputs.logits, labels, self.vocab_size), "logits": outputs.logits}


def scaled_then_capped(self, *args, labels=None, **kwargs):
    """As Muse."""
    outputs = type(self).__mro__[1].forward(self, *args, **kwargs)
    logits = outputs.logits * self.config.output_multiplier
    outputs.logits = self.config.logits_soft_cap * torch.tanh(logits / self.config.logits_soft_cap)
    if labels is not None:
        outputs.loss = self.loss_function(outputs.logits, labels, self.vocab_size)
    return outputs


def capped_then_scaled(self, *args, labels=None, **kwargs):
    outputs = type(self).__mro__[1].forward(self, *args, **kwargs)
    cap = self.config.logits_soft_cap
    outputs.logits = cap * torch.tanh(outputs.logits / cap)
    outputs.logits = outputs.logits / self.config.output_multiplier
    if labels is not None:
        outputs.loss = self.loss_function(outputs.logits, labels, self.vocab_size)
    return outputs


@pytest.mark.parametrize("forward", [renamed, scaled_then_capped, capped_then_scaled])
def test_subclass_with_scale_and_softcap(forward):
    model, (ids, labels) = subclass(forward), batch()
    model.config.output_multiplier, model.config.logits_soft_cap = 0.2, 1.5
    expected = model(input_ids=ids, labels=labels).loss
    loss_fn = LinearCausalLMLoss(model)
    torch.testing.assert_close(loss_fn(model(input_ids=ids, **loss_fn.forward_keywords), labels), expected)


@pytest.mark.parametrize(
    "forward",
    [a_z_loss, a_balance, a_balance_that_is_not_returned, smoothed, of_other_logits, aligned_already, returned],
)
def test_subclass_with_its_own_loss_error(forward):
    with pytest.raises(
        ValueError, match=r"^model: expected one (whose loss is its|whose forward calls).* got Own, whose"
    ):
        LinearCausalLMLoss(subclass(forward))


def test_class_without_source_error():
    scope = {}
    exec("def forward(self, input_ids, labels=None): pass", scope)
    with pytest.raises(
        TypeError, match=r"^model: expected a class whose source can be read, .* got Own: put it in a file"
    ):
        LinearCausalLMLoss(subclass(scope["forward"]))
