"""Heads of `transformers`' models that PEFT wraps, or whose weight is not here when the loss is called."""

import pytest
import torch
from transformers_models import H, V, batch, llama, with_lora

from compiled_loss.huggingface import LinearCausalLMLoss

pytestmark = pytest.mark.xdist_group("transformers")


HEADS = {
    "modules_to_save": (False, {"modules_to_save": ["lm_head"]}),
    "modules_to_save, both": (False, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "modules_to_save, tied": (True, {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "trainable tokens": (False, {"trainable_token_indices": [7, 9]}),
    "trainable tokens, tied": (True, {"trainable_token_indices": [7, 9]}),
}


@pytest.mark.parametrize("which", HEADS)
def test_peft_modules_to_save_and_trainable_tokens(which):
    tied, config = HEADS[which]
    model, (ids, labels) = with_lora(llama(tie_word_embeddings=tied), target_modules=["q_proj"], **config), batch()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    expected = model(input_ids=ids, labels=labels).loss
    loss_fn = LinearCausalLMLoss(model)
    found = loss_fn(model(input_ids=ids, **loss_fn.forward_keywords), labels)
    torch.testing.assert_close(found, expected)
    for a, b in zip(torch.autograd.grad(found, trained), torch.autograd.grad(expected, trained), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))


def test_lora_on_the_head_error():
    model = with_lora(llama(), target_modules=["lm_head"])
    with pytest.raises(
        TypeError, match=r"^model: expected a head .* got peft\.\S*Linear with the adapters default: merge"
    ):
        LinearCausalLMLoss(model)


def test_cpu_offloaded_head_error():
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
def test_empty_head_error(empty, text):
    model, (ids, labels) = llama(), batch()
    loss_fn = LinearCausalLMLoss(model)
    outputs = model(input_ids=ids, **loss_fn.forward_keywords)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    empty(model.lm_head)
    with pytest.raises(ValueError, match="^model: expected " + text):
        loss_fn(outputs, labels)


def test_fsdp2_sharded_head_error():
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


def test_hidden_states_of_another_width_error():
    model, (ids, labels) = llama(), batch()
    loss_fn = LinearCausalLMLoss(model)
    outputs = model(input_ids=ids, **loss_fn.forward_keywords)
    outputs.hidden_states = (outputs.hidden_states[-1][..., :-1],)
    with pytest.raises(
        ValueError, match=r"^outputs: expected as last of hidden_states \[B, S, 32\], .* got \[2, 7, 31\]: "
    ):
        loss_fn(outputs, labels)
