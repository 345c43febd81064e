"""Models inside of PEFT, torch.compile and data parallelism, and heads that are wrapped or not here."""

import warnings

import pytest
import torch
from transformers_models import H, V, batch, llama

from compiled_loss.huggingface import LinearCausalLMLoss, aligned_lm_loss, causal_lm_loss, set_loss_function

pytestmark = pytest.mark.xdist_group("transformers")


class Around(torch.nn.Module):
    """As DistributedDataParallel and DeepSpeed's engine hold a model, which they call by themselves."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def peft(model, **config):
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **config))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return adapted


WRAPPERS = {
    "none": lambda model: model,
    "PEFT": lambda model: peft(model, target_modules=["q_proj"]),
    "torch.compile of PEFT": lambda model: torch.compile(peft(model, target_modules=["q_proj"]), backend="eager"),
    "parallel": Around,
    "parallel torch.compile": lambda model: Around(torch.compile(model, backend="eager")),
}


@pytest.mark.parametrize("which", WRAPPERS)
@torch.compiler.set_stance("force_eager")
def test_wrapped_models(which):
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


def test_another_loss_function_that_was_set():
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
def test_a_subclass_that_calls_its_base(forward):
    model, (ids, labels) = subclass(forward), batch()
    model.config.output_multiplier, model.config.logits_soft_cap = 0.2, 1.5
    expected = model(input_ids=ids, labels=labels).loss
    loss_fn = LinearCausalLMLoss(model)
    torch.testing.assert_close(loss_fn(model(input_ids=ids, **loss_fn.forward_keywords), labels), expected)


@pytest.mark.parametrize(
    "forward",
    [a_z_loss, a_balance, a_balance_that_is_not_returned, smoothed, of_other_logits, aligned_already, returned],
)
def test_a_loss_with_more_in_it(forward):
    with pytest.raises(
        ValueError, match=r"^model: expected one (whose loss is its|whose forward calls).* got Own, whose"
    ):
        LinearCausalLMLoss(subclass(forward))


def test_a_class_whose_source_cannot_be_read():
    scope = {}
    exec("def forward(self, input_ids, labels=None): pass", scope)
    with pytest.raises(
        TypeError, match=r"^model: expected a class whose source can be read, .* got Own: put it in a file"
    ):
        LinearCausalLMLoss(subclass(scope["forward"]))


# Heads --------------------------------------------------------------------------------------------------------------

HEADS = {
    "modules_to_save": (False, {"modules_to_save": ["lm_head"]}),
    "modules_to_save, both": (False, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "modules_to_save, tied": (True, {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "trainable tokens": (False, {"trainable_token_indices": [7, 9]}),
    "trainable tokens, tied": (True, {"trainable_token_indices": [7, 9]}),
}


@pytest.mark.parametrize("which", HEADS)
def test_heads_that_peft_wraps(which):
    tied, config = HEADS[which]
    model, (ids, labels) = peft(llama(tie_word_embeddings=tied), target_modules=["q_proj"], **config), batch()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    expected = model(input_ids=ids, labels=labels).loss
    loss_fn = LinearCausalLMLoss(model)
    found = loss_fn(model(input_ids=ids, **loss_fn.forward_keywords), labels)
    torch.testing.assert_close(found, expected)
    for a, b in zip(torch.autograd.grad(found, trained), torch.autograd.grad(expected, trained), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))


def test_adapters_on_the_head():
    model = peft(llama(), target_modules=["lm_head"])
    with pytest.raises(
        TypeError, match=r"^model: expected a head .* got peft\.\S*Linear with the adapters default: merge"
    ):
        LinearCausalLMLoss(model)


def test_a_head_that_is_offloaded():
    accelerate = pytest.importorskip("accelerate")
    model = llama()
    accelerate.cpu_offload(model, torch.device("cpu"))
    loss_fn, (ids, labels) = LinearCausalLMLoss(model), batch()
    outputs = model(input_ids=ids, **loss_fn.forward_keywords)
    with pytest.raises(ValueError, match=r"^model: expected a head .* AlignDevicesHook brings to its device"):
        loss_fn(outputs, labels)


def zero_3(head):
    head.weight.data = torch.empty(0)
    head.weight.ds_id = 0


def meta(head):
    head.to("meta")


def flat(head):
    """FSDP, the first, between the uses of a module."""
    head.weight.data = torch.empty(0)


@pytest.mark.parametrize(
    ("empty", "text"),
    [
        (zero_3, r"a head .* whose weight ZeRO-3 holds in parts, of 0 elements here: gather it"),
        (meta, r"the head on a device, got a weight on meta: it is offloaded; keep"),
        (flat, r"the whole head \[V, H\] on every rank, got a weight \[0\]: with FSDP2"),
    ],
)
def test_a_head_that_is_empty_at_the_loss(empty, text):
    model, (ids, labels) = llama(), batch()
    loss_fn = LinearCausalLMLoss(model)
    outputs = model(input_ids=ids, **loss_fn.forward_keywords)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    empty(model.lm_head)
    with pytest.raises(ValueError, match="^model: expected " + text):
        loss_fn(outputs, labels)


def test_a_head_whose_rows_other_ranks_hold():
    """As FSDP2 leaves them after forward, with its reshard_after_forward=True."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.testing._internal.distributed.fake_pg import FakeStore

    model, (ids, labels) = llama(), batch()
    loss_fn = LinearCausalLMLoss(model)
    outputs = model(input_ids=ids, **loss_fn.forward_keywords)
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        shard = distribute_tensor(torch.zeros(V, H), init_device_mesh("cpu", (2,)), [Shard(0)])
        model.lm_head.weight = torch.nn.Parameter(shard)
        with pytest.raises(
            ValueError, match=r"^model: expected the whole head .* got a weight placed .*: with FSDP2, call"
        ):
            loss_fn(outputs, labels)
    finally:
        torch.distributed.destroy_process_group()


def test_hidden_states_that_the_head_does_not_take():
    model, (ids, labels) = llama(), batch()
    loss_fn = LinearCausalLMLoss(model)
    outputs = model(input_ids=ids, **loss_fn.forward_keywords)
    outputs.hidden_states = (outputs.hidden_states[-1][..., :-1],)
    with pytest.raises(
        ValueError, match=r"^outputs: expected as last of hidden_states \[B, S, 32\], .* got \[2, 7, 31\]: "
    ):
        loss_fn(outputs, labels)
