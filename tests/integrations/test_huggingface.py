"""Models of Hugging Face `transformers`, tiny and random: training with our losses is training with their own."""

import copy

import pytest
import torch
from comparing import assert_accurate, assert_same
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers_models import transformers_losses
from transformers_training import COUNT, TIGHT, TOKENS, B, H, S, V, batch, exact, make, plain

from compiled_loss.huggingface import LinearCausalLMLoss, causal_lm_loss, set_loss_function
from compiled_loss.testing import assert_within_error_budget

pytestmark = pytest.mark.xdist_group("transformers")  # one worker imports it: that takes seconds


def of_plain(model):
    return lambda ids, labels, count: plain(model(input_ids=ids).logits, labels, count)


def of_own(model):
    return lambda ids, labels, count: model(input_ids=ids, labels=labels, num_items_in_batch=count).loss


def of_function(model):
    model.loss_function = causal_lm_loss
    return of_own(model)


def of_hidden_states(model):
    loss_fn = LinearCausalLMLoss(model, chunking=TOKENS)

    def loss(ids, labels, count):
        return loss_fn(model(input_ids=ids, **loss_fn.forward_keywords), labels, count)

    return loss


def trained(model, loss):
    """Losses and parameters of four steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for step in range(4):
        optimizer.zero_grad()
        losses.append(loss(*batch(seed=step), torch.tensor(COUNT)))
        losses[-1].backward()
        optimizer.step()
    return torch.stack(losses).detach(), torch.cat([p.detach().reshape(-1) for p in model.parameters()])


MODELS = {
    "Llama": ("Llama", {}),
    "Qwen3": ("Qwen3", {}),
    "Qwen2, tied": ("Qwen2", {"tie_word_embeddings": True}),
}


def assert_trains_like_its_own_loss(model, of, compiled=lambda step: step):
    truth, mine = exact(model), copy.deepcopy(model)
    found, own, true = trained(mine, compiled(of(mine))), trained(model, of_own(model)), trained(truth, of_plain(truth))
    for name, actual, baseline, expected in zip(("losses", "parameters"), found, own, true, strict=True):
        assert_within_error_budget(actual, baseline, expected, name=name)


@pytest.mark.parametrize("of", [of_function, of_hidden_states])
@pytest.mark.parametrize("which", MODELS)
def test_training_matches_transformers_loss(which, of):
    name, options = MODELS[which]
    assert_trains_like_its_own_loss(make(name, **options), of)


@pytest.mark.parametrize(
    ("which", "of", "backend"),
    [
        pytest.param("Llama", of_hidden_states, "inductor", marks=pytest.mark.slow),  # g++ for twenty files
        ("Llama", of_hidden_states, "aot_eager"),
        ("Llama", of_function, "aot_eager"),
        ("Qwen2, tied", of_hidden_states, "aot_eager"),
    ],
)
def test_training_compiled(which, of, backend):
    """Model and loss in one graph, after one eager call.

    On the first that asks for hidden states `transformers` installs its hooks, under a lock, which Dynamo cannot trace.
    """

    def compiled(step):
        step(*batch(), None)
        return torch.compile(step, fullgraph=True, backend=backend)

    name, options = MODELS[which]
    assert_trains_like_its_own_loss(make(name, num_hidden_layers=1, **options), of, compiled)


@pytest.mark.parametrize("count", [None, COUNT, torch.tensor(COUNT), torch.tensor([float(COUNT)])])
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_causal_lm_loss_matches_transformers(count, shifted, dtype):
    theirs = transformers_losses().ForCausalLMLoss
    many = (3 * torch.randn(32, B, S, V)).to(dtype)  # of one number's error nothing follows
    _, labels = batch()
    labels = torch.where(labels == -100, 7, labels)
    by = 2 if shifted else 1  # two: what the function would not do by itself
    targets = F.pad(labels, (0, by), value=7)[:, by:].contiguous()
    options = {"vocab_size": V, "num_items_in_batch": count, "ignore_index": 7, "position_ids": None}
    options |= {"labels": None, "shift_labels": targets} if shifted else {"labels": labels}

    def true(logits, **_):
        losses = F.cross_entropy(logits.reshape(-1, V), targets.reshape(-1), ignore_index=7, reduction="sum")
        return losses / float((targets != 7).sum() if count is None else count)

    def call(loss):
        # Theirs has the shape of the count.
        return lambda many: torch.stack([loss(logits=logits, **options).reshape(()) for logits in many])

    assert_accurate(*map(call, (causal_lm_loss, theirs, true)), [many.requires_grad_()], upstream=torch.ones(32))
    assert torch.autograd.grad(call(causal_lm_loss)(many).sum(), many)[0].dtype == dtype


@pytest.mark.parametrize("theirs", [False, True])
def test_causal_lm_loss_saves_no_fp32_logits(theirs):
    loss = transformers_losses().ForCausalLMLoss if theirs else causal_lm_loss
    logits = torch.randn(B, S, V, dtype=torch.bfloat16, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss(logits, batch()[1], V)
    large = {t.dtype for t in kept if t.numel() >= B * (S - 1) * V}
    assert large == ({torch.float32} if theirs else {torch.bfloat16})


HEADS = {
    "Gemma2": {"final_logit_softcapping": 3.0},
    "RecurrentGemma": {"logits_soft_cap": 3.0, "block_types": ["recurrent"]},
    "xLSTM": {"output_logit_soft_cap": 3.0, "num_heads": 4},
    "Cohere": {"logit_scale": 0.25},
    "Granite": {"logits_scaling": 4.0},
    "Phi": {},  # its head has a bias
}


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("count", [None, COUNT])
def test_softcap_scale_and_bias_of_the_model(name, count):
    model = make(name, torch.float64, **HEADS[name])
    head = model.get_output_embeddings()
    wanted = [head.weight]
    if name == "Phi":
        torch.nn.init.normal_(head.bias)
        wanted.append(head.bias)
    ids, labels = batch()
    loss_fn = LinearCausalLMLoss(model, ignore_index=0, chunking=TOKENS)
    outputs = model(input_ids=ids, output_hidden_states=True)
    valid = (labels[:, 1:] != -100).sum()
    expected = plain(outputs.logits, labels, valid if count is None else count)
    actual = loss_fn(outputs, torch.where(labels == -100, 0, labels), count)
    tolerance = {"rtol": 1e-5, "atol": 1e-6, "check_dtype": False} if name == "xLSTM" else TIGHT  # fp32 logits
    assert_same(actual, expected, [outputs.hidden_states[-1], *wanted], **tolerance)


def test_moe_auxiliary_loss():
    model = make("Mixtral", output_router_logits=True, router_aux_loss_coef=0.5, num_local_experts=3)
    ids, labels = batch()
    own = model(input_ids=ids, labels=labels).loss
    loss_fn = LinearCausalLMLoss(model)
    found = loss_fn(model(input_ids=ids, **loss_fn.forward_keywords), labels)
    torch.testing.assert_close(found, own)  # the auxiliary loss is 0.5 * 2


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operator returns."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in torch.utils._pytree.tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self.size = max(self.size, value.numel())
        return result


@pytest.mark.parametrize(("of", "held"), [(of_hidden_states, False), (of_function, True)])
def test_no_logits_of_all_tokens(of, held):
    """Nor does the model compute them: it is asked for those of one position."""
    model = make("Llama")
    loss, (ids, labels) = of(model), batch()
    with Largest() as largest:
        loss(ids, labels, COUNT).backward()
    assert (largest.size >= B * S * V) == held
    assert largest.size >= V * H


def test_bf16_model_with_fp32_outputs():
    """As the Trainer's bf16=True returns them."""
    model = make("Llama", torch.bfloat16)
    ids, labels = batch()
    loss_fn = LinearCausalLMLoss(model)
    outputs = model(input_ids=ids, output_hidden_states=True)
    expected = loss_fn(outputs, labels)
    outputs.hidden_states = tuple(h.float() for h in outputs.hidden_states)
    assert loss_fn(outputs, labels) == expected


def test_loss_has_no_parameters():
    model = make("Llama")
    before = [name for name, _ in model.named_parameters()]
    loss_fn = LinearCausalLMLoss(model)
    assert not isinstance(loss_fn, torch.nn.Module) and loss_fn.model is model
    assert [name for name, _ in model.named_parameters()] == before
    ids, labels = batch()
    for _ in range(2):
        outputs = model(input_ids=ids, output_hidden_states=True)
        torch.testing.assert_close(loss_fn(outputs, labels, COUNT), plain(outputs.logits, labels, COUNT))
        model.set_output_embeddings(torch.nn.Linear(H, V, bias=False))  # the head is looked up at each call


def test_missing_hidden_states_error():
    model = make("Llama")
    ids, labels = batch()
    with pytest.raises(ValueError, match=r"^outputs: expected hidden_states, got CausalLMOutputWithPast without: call"):
        LinearCausalLMLoss(model)(model(input_ids=ids), labels)


def test_adapted_head_error():
    model = make("Llama")

    class Adapted(torch.nn.Linear):
        def forward(self, hidden):
            return 2 * super().forward(hidden)

    for head, text in (
        (Adapted(H, V), r"a head .* got \S*Adapted, which has a forward"),
        (None, "one of .* got LlamaForCausalLM with NoneType"),
    ):
        model.set_output_embeddings(head)
        with pytest.raises(TypeError, match=rf"^model: expected {text}"):
            LinearCausalLMLoss(model)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda logits, labels: causal_lm_loss(logits, labels, V + 1),
            f"vocab_size: expected V = {V}, the logits' last",
        ),
        (lambda logits, labels: causal_lm_loss(logits, labels[:, 1:], V), "labels: expected the shape of logits"),
        (lambda logits, labels: causal_lm_loss(logits, None, V), "labels: expected a Tensor, got NoneType"),
        (lambda logits, labels: causal_lm_loss(logits[..., :0], labels, 0), "logits: expected"),
        (lambda logits, labels: LinearCausalLMLoss(None, ignore_index=None), "ignore_index: expected an int"),
        (
            lambda logits, labels: LinearCausalLMLoss(None),
            "model: expected one of transformers, whose get_output_embed",
        ),
        (lambda logits, labels: LinearCausalLMLoss(None, chunking=5), "chunking: expected a Chunking, got int"),
        (lambda logits, labels: LinearCausalLMLoss(None, label_smoothing=2), "label_smoothing: expected a number from"),
        (
            lambda logits, labels: set_loss_function(torch.nn.Linear(2, 2)),
            "model: expected one of transformers, with a",
        ),
    ],
)
def test_huggingface_errors(call, text):
    with pytest.raises((TypeError, ValueError), match="^" + text):
        call(torch.zeros(B, S, V), torch.zeros(B, S, dtype=torch.int64))
