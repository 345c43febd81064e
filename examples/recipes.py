"""Losses of supervised training that have no name in the library, a few lines each, without the logits.

    loss = focal(hidden, weight, labels, power=2.0, shift=1)

A function of a token's statistics goes into `linear_token_loss`, one of a row of logits into `linear_logits_loss`:
three GEMMs, as for cross-entropy. What needs further classes of a token takes `linear_token_statistics`: four.
Tokens of label -100 do not count; further options are those of the functions that are called.

Run, it descends each for a while on one batch, and says what it costs in GEMMs over the vocabulary.

    python examples/recipes.py
    python examples/recipes.py --steps 100
"""

import argparse
import math

import torch
from torch.utils.flop_counter import FlopCounterMode

from compiled_loss import (
    Chunking,
    linear_cross_entropy,
    linear_logits_loss,
    linear_policy_loss,
    linear_token_loss,
    linear_token_statistics,
)


def dft(hidden, weight, labels, **options):
    """Dynamic fine-tuning: a token weighs what it is likely, -sg(p) log p.

    Wu et al., 2025, arXiv:2508.05629.

        loss = dft(hidden, weight, labels, shift=1)
        loss.backward()
    """
    return linear_token_loss(hidden, weight, labels, _dft, **options)


def _dft(statistics):
    return -statistics.logprob * statistics.logprob.exp().detach()


def eaft(hidden, weight, labels, power=1.0, chunking=Chunking()):
    """Entropy-adaptive fine-tuning: -sg(H / log 20)^power log p, H the entropy of the 20 likeliest classes.

    What the model is sure of, and wrong about, is learned less. Diao et al., 2026, arXiv:2601.02151, whose code divides
    by 3.0, which is log 20.

        loss = eaft(hidden[:, :-1], weight, labels[:, 1:], power=1.0)
        loss.backward()
    """
    counts = labels != -100
    inputs = (torch.where(counts, labels, 0), power)
    return linear_logits_loss(hidden, weight, _eaft, *inputs, mask=counts, chunking=chunking)


def _eaft(logits, label, power):
    log_p = logits.detach().topk(min(20, logits.shape[1]), dim=1).values.log_softmax(1)
    entropy = -(log_p.exp() * log_p).sum(1)
    nll = logits.logsumexp(1) - logits.gather(1, label.unsqueeze(1)).squeeze(1)
    return (entropy / math.log(20)) ** power * nll


def focal(hidden, weight, labels, power=2.0, **options):
    """Focal loss: what is likely already weighs less, -(1 - p)^power log p.

    Lin et al., 2017, arXiv:1708.02002.

        loss = focal(hidden, weight, labels, power=2.0, mask=mask)
        loss.backward()
    """
    return linear_token_loss(hidden, weight, labels, _focal, power, **options)


def _focal(statistics, power):
    return -((1 - statistics.logprob.exp()) ** power) * statistics.logprob


def z_loss(hidden, weight, labels, strength=1e-4, centre=0.0, **options):
    """Cross-entropy, and a pull of log sum exp(z) to a centre of your own: -log p + strength (lse - centre)^2.

    Chowdhery et al., 2022, arXiv:2204.02311, with 0; which `linear_cross_entropy` has as `z_loss`.

        loss = z_loss(hidden, weight, labels, strength=1e-4, centre=math.log(vocab))
        loss.backward()
    """
    return linear_token_loss(hidden, weight, labels, _z_loss, strength, centre, **options)


def _z_loss(statistics, strength, centre):
    return -statistics.logprob + strength * (statistics.logsumexp - centre) ** 2


def masked_diffusion(hidden, weight, labels, masked, time, **options):
    """Masked diffusion, linear schedule: the sum of -log p / t over masked tokens, over the count of all.

    `masked` [B, S], `time` from 0 to 1, the chance with which a token was masked: [B, 1], or [B, S] where each block
    has its own (block diffusion). Sahoo et al., 2024, arXiv:2406.07524 (MDLM); Arriola et al., 2025, arXiv:2503.09573.

        loss = masked_diffusion(hidden, weight, labels, masked, time)
        loss.backward()
    """
    count = (labels != -100).sum()
    weights = {"mask": masked, "token_weights": 1 / time}
    return linear_cross_entropy(hidden, weight, labels, reduction="sum", num_label_tokens=count, **weights, **options)


def unlikelihood(hidden, weight, labels, bad_ids, strength=1.0, chunking=Chunking()):
    """Cross-entropy, and classes that should not be said: -log p - strength * the sum of log(1 - p[c]).

    `bad_ids` [..., K], of each token, negative ones padding; such as the tokens before it but for the label. Welleck
    et al., 2019, arXiv:1908.04319, whose code bounds 1 - p by 1e-5 from below.

        loss = unlikelihood(hidden, weight, labels, bad_ids)
        loss.backward()
    """
    found = linear_token_statistics(hidden, weight, labels, ids=bad_ids, wanted=("logprob",), chunking=chunking)
    bad = -(1 - found.ids_logprob.exp()).clamp(min=1e-5).log().sum(-1)
    return _mean(-found.logprob + strength * bad, labels)


def smoothed_to_teacher(hidden, weight, labels, ids, probabilities, smoothing=0.1, chunking=Chunking()):
    """Label smoothing towards a teacher: -(1 - s) log p - s * the sum of q[k] log p[k] over the teacher's classes.

    `ids` and `probabilities` q [..., K], which sum to 1. Szegedy et al., 2016, arXiv:1512.00567, with the teacher of
    Yuan et al., 2020, arXiv:1909.11723, in place of the uniform distribution.

        loss = smoothed_to_teacher(hidden, weight, labels, ids, probabilities)
        loss.backward()
    """
    found = linear_token_statistics(hidden, weight, labels, ids=ids, wanted=("logprob",), chunking=chunking)
    soft = (probabilities * found.ids_logprob).sum(-1)
    return _mean(-(1 - smoothing) * found.logprob - smoothing * soft, labels)


def list_mle(hidden, weight, ids, chunking=Chunking()):
    """ListMLE: the likelihood of an order of classes, the sum over k of log(sum of exp(z[j]) over j >= k) - z[k].

    `ids` [..., K] of each token, the best first, no padding. The classes are the whole support, so no GEMM over V is
    done. Xia et al., 2008, Listwise approach to learning to rank.

        loss = list_mle(hidden, weight, ids)
        loss.backward()
    """
    wanted = {"ids": ids, "kept_ids": ids, "wanted": ("logprob",)}
    z = linear_token_statistics(hidden, weight, ids[..., 0], chunking=chunking, **wanted).ids_logprob
    return (z.flip(-1).logcumsumexp(-1).sum(-1) - z.sum(-1)).mean()


def optimal_token_baseline(hidden, weight, labels, rewards, chunking=Chunking()):
    """REINFORCE of answers [G, S] to one prompt, with a baseline for each token that leaves the least variance.

    Rewards [G] are weighted by W, the sum up to a token of |d log p / d z|^2 = 1 - 2 p + the sum of p^2; the baseline
    is sum(W reward) / sum(W) over answers. Li et al., 2026, arXiv:2602.07078.

        loss = optimal_token_baseline(hidden, weight, labels, rewards)
        loss.backward()
    """
    counts = labels != -100
    with torch.no_grad():
        wanted = ("logprob", "log_sum_sq_probs")
        found = linear_token_statistics(hidden, weight, labels, wanted=wanted)
        energy = 1 - 2 * found.logprob.exp() + found.log_sum_sq_probs.exp()
        energy = torch.where(counts, energy, 0.0).cumsum(-1) * counts
        rewards = rewards.unsqueeze(-1)
        advantages = rewards - (rewards * energy).sum(0) / energy.sum(0).clamp(min=1e-8)
    options = {"kind": "reinforce", "chunking": chunking}
    return linear_policy_loss(hidden, weight, labels, found.logprob, advantages, **options).loss


def _mean(losses, labels):
    counts = labels != -100
    return torch.where(counts, losses, 0.0).sum() / counts.sum().clamp(min=1)


def recipes(batch, vocab):
    """Each as a function of hidden states [G, S, H], a head and a chunking."""
    labels = torch.randint(0, vocab, batch)
    ids = torch.rand(*batch, vocab).argsort(-1)[..., :4]
    bad_ids = torch.where(ids == labels.unsqueeze(-1), -1, ids)
    probabilities = torch.rand(*batch, 4).softmax(-1)
    time = torch.rand(batch[0], 1) * 0.9 + 0.1
    masked = torch.rand(batch) < time
    rewards = torch.rand(batch[0])
    inputs = {
        dft: (labels,),
        eaft: (labels,),
        focal: (labels,),
        z_loss: (labels,),
        masked_diffusion: (labels, masked, time),
        unlikelihood: (labels, bad_ids),
        smoothed_to_teacher: (labels, ids, probabilities),
        list_mle: (ids,),
        optimal_token_baseline: (labels, rewards),
    }
    return labels, inputs


def gemms(recipe, hidden, weight, inputs):
    """Its multiplications, forward and back, over those of one hidden @ weight.T."""
    counter = FlopCounterMode(display=False)
    with counter:
        recipe(hidden, weight, *inputs).backward()
    return counter.get_total_flops() / (2 * hidden.numel() * weight.shape[0])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="of gradient descent by each recipe")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    batch, width, vocab = (4, 16), 32, 200
    start = [torch.randn(*batch, width), 0.3 * torch.randn(vocab, width)]
    labels, inputs = recipes(batch, vocab)
    print(f"{'recipe':22}  GEMMs  {'loss':>16}  {'cross-entropy':>16}")
    for recipe, given in inputs.items():
        hidden, weight = parameters = [v.clone().requires_grad_() for v in start]
        optimizer = torch.optim.SGD(parameters, lr=3.0)
        rows = []
        for _ in range(arguments.steps + 1):
            loss = recipe(hidden, weight, *given)
            rows.append((loss.item(), linear_cross_entropy(hidden, weight, labels).item()))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        columns = [f"{rows[0][i]:7.3f} {rows[-1][i]:8.3f}" for i in range(2)]
        print(f"{recipe.__name__:22}  {gemms(recipe, hidden, weight, given):5.2f}  {'  '.join(columns)}")
    print(f"of each the first and the one after {arguments.steps} steps")


if __name__ == "__main__":
    main()
