"""fuse_head: what a forward may do to its logits gives the loss and the gradients of real ones, or is an error."""

import copy
import inspect

import pytest
import torch
from comparing import TIGHT
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from compiled_loss import Chunking
from compiled_loss.integrations.transformers import DeferredLogits, fuse_head, unfuse_head

B, S, H, V = 2, 7, 6, 11


class Model(torch.nn.Module):
    """As those of transformers: `finish(model, logits, labels)` is what stands between head and loss."""

    def __init__(self, finish, bias=False):
        super().__init__()
        torch.manual_seed(0)
        self.finish = finish
        self.embedding = torch.nn.Embedding(V, H, dtype=torch.float64)
        self.lm_head = torch.nn.Linear(H, V, bias=bias, dtype=torch.float64)
        self.register_buffer("final_logits_bias", torch.randn(1, V, dtype=torch.float64))
        with torch.no_grad():
            self.lm_head.weight.mul_(5)

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids, labels=None):
        logits = self.lm_head(self.embedding(input_ids))
        loss = None if labels is None else self.finish(self, logits, labels)
        return {"loss": loss, "logits": logits}


def batch():
    ids = torch.randint(0, V, (B, S), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, :3] = -100
    return ids, labels


def step(model):
    ids, labels = batch()
    model.zero_grad()
    output = model(ids, labels=labels)
    output["loss"].backward()
    return output, [parameter.grad.clone() for parameter in model.parameters()]


def aligned(logits, labels, **options):
    return F.cross_entropy(logits.contiguous().view(-1, logits.shape[-1]), labels.view(-1), **options)


def causal(model, logits, labels):
    """As ForCausalLMLoss."""
    labels = F.pad(labels, (0, 1), value=-100)[..., 1:].contiguous()
    return aligned(logits.to(torch.float64), labels.to(logits.device), reduction="sum") / torch.tensor(9)


def shifted(model, logits, labels):
    """As classes with a loss of their own."""
    shift_logits, shift_labels = logits[..., :-1, :].contiguous(), labels[..., 1:].contiguous()
    return torch.nn.CrossEntropyLoss()(shift_logits.view(-1, V), shift_labels.view(-1))


def scaled_and_capped(model, logits, labels):
    logits = 0.7 * logits
    logits = logits / 3
    logits = torch.tanh(logits)
    return aligned(logits * 3 / 1.5, labels)


def in_place(model, logits, labels):
    alias = logits
    logits /= 2
    logits *= 3
    return aligned(alias, labels)


def capped_by_one(model, logits, labels):
    return aligned((logits * 2).tanh(), labels)


def biased(model, logits, labels):
    return aligned((logits + model.final_logits_bias + model.final_logits_bias[0]) * 0.5, labels)


def unpadded(model, logits, labels):
    return aligned((logits + model.final_logits_bias)[..., : V - 2], labels.clamp(max=V - 3))


def weighted_and_smoothed(model, logits, labels):
    weight = torch.linspace(0.5, 2, V, dtype=torch.float64)
    return aligned(logits, labels.where(labels >= 0, 4), weight=weight, label_smoothing=0.1, ignore_index=4)


def classes_second(model, logits, labels):
    first = F.cross_entropy(logits.permute(0, 2, 1), labels, reduction="none")
    back = logits.transpose(1, 2).transpose(-1, -2)
    return (first * F.cross_entropy(back.transpose(1, 2), labels, reduction="none")).mean()


def masked(model, logits, labels):
    """As GraniteSpeech."""
    mask = labels[:, 1:] != -100
    return F.cross_entropy(logits[:, :-1, :][mask], labels[:, 1:][mask])


def windows(model, logits, labels):
    """Slices, integers and reshapes of positions."""
    first = F.cross_entropy(logits[:, 2:5].reshape(3 * B, -1), labels[:, 2:5].flatten())
    second = F.cross_entropy(logits[1].view(S, V), labels[1])
    third = F.cross_entropy(logits[None, 1, ::2].flatten(0, 1), labels[1, ::2])
    fourth = F.cross_entropy(logits.permute(1, 0, 2).flatten(end_dim=-2), labels.t().flatten())
    return first + 2 * second + 3 * third + 4 * fourth


def z_loss(model, logits, labels):
    """As Bamba's, and another way to say it."""
    squares = torch.logsumexp(logits * 2, dim=-1).square().mean() + logits.logsumexp(-1, keepdim=True).mean()
    return aligned(logits, labels) + 0.1 * squares


def nll(model, logits, labels):
    """As ProphetNet."""
    return F.nll_loss(F.log_softmax(logits.view(-1, V), dim=-1), labels.view(-1), reduction="sum")


def label_smoother(model, logits, labels):
    """As the Trainer's."""
    log_probs, ignored = -F.log_softmax(logits, dim=-1), (labels == -100).unsqueeze(-1)
    chosen = log_probs.gather(dim=-1, index=labels.clamp(min=0).unsqueeze(-1))
    total = log_probs.sum(dim=-1, keepdim=True, dtype=torch.float64)
    chosen.masked_fill_(ignored, 0.0)
    total.masked_fill_(ignored, 0.0)
    return chosen.sum() * 0.7 + total.sum() * 0.3 / log_probs.shape[-1] + torch.log_softmax(logits, -1).sum(-1).mean()


FINISHES = [causal, shifted, scaled_and_capped, capped_by_one, biased, unpadded, weighted_and_smoothed, classes_second]
FINISHES += [in_place, masked, windows, z_loss, nll, label_smoother]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("finish", FINISHES)
def test_loss_and_gradients_are_those_of_logits(finish, bias):
    expected, gradients = step(Model(finish, bias))
    model = Model(finish, bias)
    fuse_head(model)
    found, mine = step(model)
    torch.testing.assert_close(found["loss"], expected["loss"], **TIGHT)
    torch.testing.assert_close(mine, gradients, rtol=1e-10, atol=1e-12)
    assert isinstance(found["logits"], DeferredLogits)


REFUSED = {  # what a forward does, and what the error calls it
    "an assignment": lambda logits: logits.__setitem__((0, 0), 0.0),
    "masked_fill": lambda logits: logits.masked_fill(torch.ones(V, dtype=torch.bool), -1.0),
    "argmax": lambda logits: torch.argmax(logits, -1),
    "a product with Tensor": lambda logits: logits * torch.ones(V),
    "a quotient with str": lambda logits: logits / "2",
    "a product with Tensor:": lambda logits: torch.ones(V) * logits,
    "mul": lambda logits: torch.mul(torch.ones(V), logits),
    "a sum with (2, 7, 11) (of adapters": lambda logits: logits + torch.ones(B, S, V),
    "a sum with (11,)": lambda logits: logits.tanh() + torch.ones(V),
    "a sum with (7, 1)": lambda logits: logits + torch.ones(S, 1),
    "a sum:": lambda logits: logits + 1.0,
    "a second tanh": lambda logits: logits.tanh().tanh(),
    "to another device": lambda logits: logits.to("meta"),
    "view(14, 6) of [..., 11]": lambda logits: logits.view(14, 6),
    "view(7, -1) of [..., 11]": lambda logits: logits.view(7, -1),
    "flatten of the classes": lambda logits: logits.flatten(),
    "permute(2, 0, 1)": lambda logits: logits.permute(2, 0, 1),
    "view of [B, V, ...]": lambda logits: logits.transpose(1, 2).view(-1, V),
    "an index of classes": lambda logits: logits[..., 2:],
    "an index of [B, V, ...]": lambda logits: logits.transpose(1, 2)[0],
    "cross_entropy of (2, 7, 11), whose dimension 1": lambda logits: F.cross_entropy(logits, batch()[1]),
    "cross_entropy of probabilities": lambda logits: aligned(logits, torch.rand(B * S, V)),
    "cross_entropy with size_average": lambda logits: aligned(logits, batch()[1].abs(), size_average=False),
    "logsumexp over positions": lambda logits: logits.logsumexp(1),
    "log_softmax over positions": lambda logits: F.log_softmax(logits, dim=1),
    "exp of log_softmax": lambda logits: F.log_softmax(logits, dim=-1).exp(),
    "kl_div of log_softmax": lambda logits: F.kl_div(F.log_softmax(logits, dim=-1), torch.rand(B, S, V)),
    "gather of (2, 7, 2) of log_softmax": lambda logits: F.log_softmax(logits, dim=-1).gather(
        -1, torch.zeros(B, S, 2, dtype=torch.int64)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_hidden_states_cannot_do_is_an_error(name):
    def finish(model, logits, labels):
        return aligned(logits, labels) + (REFUSED[name](logits) is None)

    model = Model(finish)
    fuse_head(model)
    with pytest.raises((TypeError, AttributeError)) as error:
        step(model)
    text = "model: expected a forward that scales, bounds, selects and reshapes its logits and computes cross_entropy "
    assert str(error.value).startswith(f"{text}of them, got Model, which also does {name}")
    assert "call unfuse_head(model)" in str(error.value)
    ids, _ = batch()
    assert model(ids)["logits"].shape == (B, S, V)  # the step that failed has ended


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
