"""Models of Hugging Face `transformers`, tiny and random: training with our losses is training with their own."""

import copy
import os

import pytest
import torch
from comparing import assert_accurate, assert_same
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import SequentialSampler

from compiled_loss import Chunking
from compiled_loss.huggingface import LinearCausalLMLoss, causal_lm_loss, set_loss_function
from compiled_loss.testing import assert_within_error_budget

pytestmark = pytest.mark.xdist_group("transformers")  # one worker imports it: that takes seconds

B, S, H, V = 3, 7, 16, 61
COUNT = 23  # of a step's microbatches together
TOKENS = Chunking(strategy="tokens", chunk_size=5)
TIGHT = {"rtol": 1e-10, "atol": 1e-12}  # fp64, through layers and steps


def transformers():
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    import transformers as library

    return library


def make(name, dtype=torch.float32, **options):
    """A model of a family, with a spread of logits that makes the loss depend on them."""
    torch.manual_seed(0)
    sizes = {"vocab_size": V, "hidden_size": H, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None, "use_cache": False}
    library = transformers()
    config = getattr(library, f"{name}Config")(**{**sizes, **heads, **tokens, "tie_word_embeddings": False, **options})
    model = getattr(library, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    return model.to(dtype).train()


def exact(model):
    """A copy in fp64: `transformers` rounds to fp32 in its norms."""
    model = copy.deepcopy(model).double()
    for name, norm in list(model.named_modules()):
        if type(norm).__name__.endswith("RMSNorm"):
            new = torch.nn.RMSNorm(norm.weight.shape, eps=norm.variance_epsilon, dtype=torch.float64)
            new.weight = norm.weight
            model.set_submodule(name, new)
    return model


def batch(rows=B, seed=0):
    """Ids and labels [rows, S]: each row ignores another number of its first labels, as prompts are."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, V, (rows, S), generator=random)
    prompt = torch.randint(0, S - 1, (rows, 1), generator=random)
    return ids, torch.where(torch.arange(S) < prompt, -100, ids)


def plain(logits, labels, count):
    """What all of this is about, in plain torch."""
    losses = F.cross_entropy(logits[:, :-1].reshape(-1, V), labels[:, 1:].reshape(-1), reduction="sum")
    return losses / count


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
def test_training(which, of):
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
def test_the_function_means_what_theirs_means(count, shifted, dtype):
    theirs = transformers().loss.loss_utils.ForCausalLMLoss
    logits = (3 * torch.randn(B, S, V)).to(dtype)
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
        return lambda logits: loss(logits=logits, **options).reshape(())  # theirs has the shape of the count

    assert_accurate(*map(call, (causal_lm_loss, theirs, true)), [logits.requires_grad_()])
    assert torch.autograd.grad(call(causal_lm_loss)(logits), logits)[0].dtype == dtype


@pytest.mark.parametrize("theirs", [False, True])
def test_no_fp32_copy_of_the_logits_is_kept(theirs):
    loss = transformers().loss.loss_utils.ForCausalLMLoss if theirs else causal_lm_loss
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
def test_softcap_scale_and_bias_are_the_models(name, count):
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


def test_the_auxiliary_loss_of_experts_is_added():
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


def test_a_model_of_bf16_whose_outputs_are_fp32():
    """As the Trainer's bf16=True returns them."""
    model = make("Llama", torch.bfloat16)
    ids, labels = batch()
    loss_fn = LinearCausalLMLoss(model)
    outputs = model(input_ids=ids, output_hidden_states=True)
    expected = loss_fn(outputs, labels)
    outputs.hidden_states = tuple(h.float() for h in outputs.hidden_states)
    assert loss_fn(outputs, labels) == expected


def test_the_parameters_stay_the_models():
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


# The Trainer --------------------------------------------------------------------------------------------------------


def run(model, tmp_path, rows, label_smoothing_factor=0.0, **options):
    """What `Trainer.train` returns for microbatches of 2 rows, 3 of them a step."""
    library = transformers()

    class InOrder(library.Trainer):
        def _get_train_sampler(self, *_):
            return SequentialSampler(self.train_dataset)

    arguments = library.TrainingArguments(
        output_dir=tmp_path,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
        num_train_epochs=1,
        learning_rate=0.1,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        label_smoothing_factor=label_smoothing_factor,
    )
    return InOrder(model, arguments, train_dataset=rows, **options).train()


def collate(rows):
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


@pytest.mark.parametrize("through", ["compute_loss_func", "loss_function"])
def test_trainer_with_gradient_accumulation_is_the_big_batch(through, tmp_path):
    """Two steps of three microbatches, whose numbers of labels differ, and a third of two rows left over."""
    model = exact(make("Llama"))
    expected = copy.deepcopy(model)
    ids, labels = batch(rows=14)
    rows = [{"input_ids": i, "labels": t} for i, t in zip(ids, labels, strict=True)]
    counts = (labels[:, 1:] != -100).sum(-1).reshape(-1, 2).sum(-1)
    assert len(set(counts[:3].tolist())) > 1  # or a mean of means would pass

    if through == "loss_function":
        model.loss_function = causal_lm_loss
        result = run(model, tmp_path, rows, data_collator=collate)
    else:
        loss_fn = LinearCausalLMLoss(model, chunking=TOKENS)
        seen = []

        def compute(outputs, labels, num_items_in_batch=None):
            seen.append((outputs.logits.shape, int(num_items_in_batch)))
            return loss_fn(outputs, labels, num_items_in_batch)

        result = run(
            model,
            tmp_path,
            rows,
            compute_loss_func=compute,
            data_collator=lambda rows: collate(rows) | loss_fn.forward_keywords,
        )
        steps = [int(part.sum()) for part in counts.split(3)]
        assert seen == [
            ((2, 1, V), n) for n, microbatches in zip(steps, (3, 3, 1), strict=True) for _ in range(microbatches)
        ]

    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1)
    losses = []
    for big in (slice(0, 6), slice(6, 12), slice(12, 14)):
        optimizer.zero_grad()
        losses.append(plain(expected(input_ids=ids[big]).logits, labels[big], (labels[big, 1:] != -100).sum()))
        losses[-1].backward()
        optimizer.step()
    torch.testing.assert_close(list(model.parameters()), list(expected.parameters()), **TIGHT)
    # The Trainer adds the losses of microbatches up in fp32.
    torch.testing.assert_close(result.training_loss, float(torch.stack(losses).detach().mean()), rtol=1e-6, atol=0)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_the_trainers_label_smoothing(smoothing, tmp_path):
    """It smooths the loss that models compute, but not that of a compute_loss_func."""
    model = make("Llama", torch.float64)
    ids, labels = batch(rows=6)
    rows = [{"input_ids": i, "labels": t} for i, t in zip(ids, labels, strict=True)]

    def trained(model, tmp_path, **options):
        result = run(model, tmp_path, rows, label_smoothing_factor=smoothing, **options)
        return result.training_loss, *model.parameters()

    def ours(value):
        mine = copy.deepcopy(model)
        loss_fn = LinearCausalLMLoss(mine, label_smoothing=value)
        return mine, {
            "compute_loss_func": loss_fn,
            "data_collator": lambda rows: collate(rows) | loss_fn.forward_keywords,
        }

    mine, options = ours(smoothing)
    found = trained(mine, tmp_path / "mine", **options)
    expected = trained(copy.deepcopy(model), tmp_path / "theirs", data_collator=collate)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=0)
    # Their logits are fp32: eps times gradients of up to 5.
    torch.testing.assert_close(found[1:], expected[1:], rtol=0, atol=1e-6)
    mine, options = ours(0.1)
    with pytest.raises(ValueError, match=rf"^label_smoothing: expected {smoothing}, the Trainer's .* got 0.1: Linear"):
        trained(mine, tmp_path / "other", **options)


# Refusals -----------------------------------------------------------------------------------------------------------


def test_without_hidden_states():
    model = make("Llama")
    ids, labels = batch()
    with pytest.raises(ValueError, match=r"^outputs: expected hidden_states, got CausalLMOutputWithPast without: call"):
        LinearCausalLMLoss(model)(model(input_ids=ids), labels)


def test_a_head_that_is_more_than_its_weight():
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
def test_refusals(call, text):
    with pytest.raises((TypeError, ValueError), match="^" + text):
        call(torch.zeros(B, S, V), torch.zeros(B, S, dtype=torch.int64))
