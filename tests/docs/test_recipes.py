"""Each recipe beside the formula of its source, of all logits in fp64 by plain autograd."""

import math
import runpy
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from compiled_loss import Chunking

RECIPES = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "recipes.py"))
G, S, WIDTH, VOCAB, K = 3, 7, 6, 37, 4


class Inputs:
    """Of a batch in which tokens are ignored, classes are padded and labels are likely or not."""

    def __init__(self, dtype=torch.float64):
        random = torch.Generator().manual_seed(5)
        self.hidden = torch.randn(G, S, WIDTH, generator=random, dtype=dtype)
        self.weight = torch.randn(VOCAB, WIDTH, generator=random, dtype=dtype)
        best = (self.hidden @ self.weight.T).argmax(-1)
        other = torch.randint(0, VOCAB, (G, S), generator=random)
        self.labels = torch.where(torch.rand(G, S, generator=random) < 0.4, best, other)
        self.labels[0, 2] = self.labels[2, 4:] = -100
        self.ids = torch.rand(G, S, VOCAB, generator=random).argsort(-1)[..., :K]
        same = self.ids == self.labels.unsqueeze(-1)
        self.bad_ids = torch.where(same | (torch.rand(G, S, K, generator=random) < 0.2), -1, self.ids)
        self.probabilities = torch.rand(G, S, K, generator=random, dtype=dtype).softmax(-1)
        self.masked = torch.rand(G, S, generator=random) < 0.6
        self.time = torch.rand(G, 1, generator=random, dtype=dtype) * 0.9 + 0.1
        self.rewards = torch.rand(G, generator=random, dtype=dtype)


def counted(losses, labels):
    return losses[labels != -100].mean()


def of_labels(log_p, labels):
    return log_p.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)


def dft(z, given):
    log_p = of_labels(z.log_softmax(-1), given.labels)
    return counted(-log_p.detach().exp() * log_p, given.labels)


def eaft(z, given):
    kept = z.detach().topk(20).values.softmax(-1)
    entropy = torch.distributions.Categorical(kept).entropy()
    losses = -of_labels(z.log_softmax(-1), given.labels)
    return counted((entropy / math.log(20)).sqrt() * losses, given.labels)


def focal(z, given):
    p = of_labels(z.softmax(-1), given.labels)
    return counted(-((1 - p) ** 3) * p.log(), given.labels)


def z_loss(z, given):
    nll = F.cross_entropy(z.flatten(0, 1), given.labels.flatten())
    return nll + 0.1 * counted((z.exp().sum(-1).log() - 2) ** 2, given.labels)


def masked_diffusion(z, given):
    losses, counts = -of_labels(z.log_softmax(-1), given.labels), given.labels != -100
    return (losses / given.time)[counts & given.masked].sum() / counts.sum()


def unlikelihood(z, given):
    p = z.softmax(-1)
    bad = torch.zeros_like(p).scatter_add(-1, given.bad_ids.clamp(min=0), (given.bad_ids >= 0).to(p.dtype))
    losses = -of_labels(p.log(), given.labels) - 0.5 * (bad * (1 - p).clamp(min=1e-5).log()).sum(-1)
    return counted(losses, given.labels)


def smoothed_to_teacher(z, given):
    hard = F.one_hot(given.labels.clamp(min=0), VOCAB).to(z.dtype)
    soft = torch.zeros_like(z).scatter(-1, given.ids, given.probabilities)
    return counted(-((0.8 * hard + 0.2 * soft) * z.log_softmax(-1)).sum(-1), given.labels)


def list_mle(z, given):
    z, losses = z.gather(-1, given.ids), 0
    for k in range(K):
        losses = losses - (z[..., k].exp() / z[..., k:].exp().sum(-1)).log()
    return losses.mean()


def optimal_token_baseline(z, given):
    """The squared norms are those of gradients, not their formula."""
    log_p, counts = of_labels(z.log_softmax(-1), given.labels), given.labels != -100
    norms = torch.autograd.grad(log_p.sum(), z, retain_graph=True)[0].square().sum(-1)
    norms = (norms * counts).cumsum(-1) * counts
    rewards = given.rewards[:, None]
    baseline = (rewards * norms).sum(0) / norms.sum(0).clamp(min=1e-8)
    return counted(-(rewards - baseline) * log_p, given.labels)


CASES = {  # (formula, names of what it is given, its options)
    "dft": (dft, ("labels",), {}),
    "eaft": (eaft, ("labels",), {"power": 0.5}),
    "focal": (focal, ("labels",), {"power": 3.0}),
    "z_loss": (z_loss, ("labels",), {"strength": 0.1, "centre": 2.0}),
    "masked_diffusion": (masked_diffusion, ("labels", "masked", "time"), {}),
    "unlikelihood": (unlikelihood, ("labels", "bad_ids"), {"strength": 0.5}),
    "smoothed_to_teacher": (smoothed_to_teacher, ("labels", "ids", "probabilities"), {"smoothing": 0.2}),
    "list_mle": (list_mle, ("ids",), {}),
    "optimal_token_baseline": (optimal_token_baseline, ("labels", "rewards"), {}),
}
STRATEGIES = {"eaft": "tokens", "unlikelihood": "vocab", "smoothed_to_teacher": "vocab", "list_mle": "vocab"}


def value_and_gradients(loss, inputs):
    leaves = [v.detach().clone().requires_grad_() for v in (inputs.hidden, inputs.weight)]
    value = loss(*leaves)
    return value.detach(), *torch.autograd.grad(value, leaves)


def found(name, inputs, chunking):
    _, names, options = CASES[name]
    given = [getattr(inputs, each) for each in names]
    return value_and_gradients(lambda *head: RECIPES[name](*head, *given, **options, chunking=chunking), inputs)


def expected(name, inputs):
    return value_and_gradients(lambda hidden, weight: CASES[name][0](hidden @ weight.T, inputs), inputs)


@pytest.mark.parametrize(
    ("name", "strategy"), [(name, s) for name in CASES for s in STRATEGIES.get(name, "tokens vocab").split()]
)
def test_formula(name, strategy):
    inputs = Inputs()
    for size in (4, 100):  # ragged chunks, and one
        pairs = zip(
            found(name, inputs, Chunking(strategy=strategy, chunk_size=size)), expected(name, inputs), strict=True
        )
        for ours, theirs in pairs:
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_fp32(name):
    """Within what fp32 logits leave: 2^-24 of the largest logit, times the slopes of a few exponentials."""
    exact, narrow = Inputs(), Inputs()
    for each, value in vars(narrow).items():
        setattr(narrow, each, value.float() if value.is_floating_point() else value)
    largest = (exact.hidden @ exact.weight.T).abs().max().item()
    for ours, theirs in zip(found(name, narrow, Chunking()), expected(name, exact), strict=True):
        assert (ours - theirs).abs().max() <= 8 * 2**-24 * largest * theirs.abs().max()


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_other_strategy_is_refused(name):
    other = {"tokens": "vocab", "vocab": "tokens"}[STRATEGIES[name]]
    with pytest.raises(ValueError, match="strategy"):
        found(name, Inputs(), Chunking(strategy=other))


def test_every_recipe_is_compared_and_has_a_source():
    public = {name for name, value in RECIPES.items() if getattr(value, "__module__", None) == RECIPES["__name__"]}
    public = {name for name in public if not name.startswith("_")} - {"recipes", "gemms", "main"}
    assert public == set(CASES)
    assert all(
        "loss = " + name in RECIPES[name].__doc__ and "et al., " in " ".join(RECIPES[name].__doc__.split())
        for name in public
    )
