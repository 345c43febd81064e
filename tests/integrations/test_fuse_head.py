"""fuse_head: what a forward may do to its logits gives the loss and the gradients of real ones, or is an error."""

import pytest
import torch
from comparing import TIGHT
from fused_models import B, Model, S, V, aligned, batch, causal, label_smoother, shifted, step, z_loss
from torch.nn import functional as F

from compiled_loss.integrations.transformers import DeferredLogits, fuse_head


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


def nll(model, logits, labels):
    """As ProphetNet."""
    assert logits.is_contiguous()
    return F.nll_loss(F.log_softmax(logits.view(-1, V), dim=-1), labels.view(-1), reduction="sum")


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
