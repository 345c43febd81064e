"""Errors of preference and reward losses: each names its argument, and says what goes with what."""

import pytest
import torch

from compiled_loss import bradley_terry_loss, kto_loss, linear_kto_loss, linear_preference_loss, preference_loss
from compiled_loss.testing import head_inputs

P, S, WIDTH, VOCAB = 3, 7, 5, 29


def batch():
    hidden, weight, labels, _ = head_inputs(2 * P * S, WIDTH, VOCAB, dtype=torch.float64)
    return hidden.view(2 * P, S, WIDTH), weight, labels.view(2 * P, S), torch.zeros(2 * P, S, dtype=torch.float64)


ERRORS = {
    "kind: expected one of 'sigmoid', .* got 'dpo'": {"kind": "dpo"},
    "label_smoothing: expected a number >= 0 and < 0.5 beside kind='robust', got 0.5": {
        "kind": "robust",
        "label_smoothing": 0.5,
    },
    "label_smoothing: expected a number between 0 and 1 beside kind='exo', got 0.0": {"kind": "exo"},
    "label_smoothing: expected 0 beside kind='hinge', got 0.1": {"kind": "hinge", "label_smoothing": 0.1},
    "margin: expected 0 beside kind='ipo', got 0.5": {"kind": "ipo", "margin": 0.5},
    "pair_margins: expected None where kind='nca', which has no margin, got a Tensor": {
        "kind": "nca",
        "pair_margins": torch.zeros(P),
    },
    "f_divergence: expected 'reverse_kl' beside kind='apo_zero', got 'js'": {"kind": "apo_zero", "f_divergence": "js"},
    "length_normalised: expected True beside kind='orpo', got False": {"kind": "orpo", "reference_logprob": None},
    "reference_logprob: expected None where kind='orpo', which has none, got a Tensor": {
        "kind": "orpo",
        "length_normalised": True,
    },
    r"reference_logprob: expected \[6\], one for each answer, got \[3\]": {"reference_logprob": torch.zeros(P)},
    r"reference_logprob: expected \[6, 7\], a value for each token, got \[6, 1\]": {
        "reference_logprob": torch.zeros(2 * P, 1)
    },
    r"pair_margins: expected \[3\], one for each pair, got \[6\]": {"pair_margins": torch.zeros(2 * P)},
    "num_pairs: expected None where segment_ids are not given, got a int": {"num_pairs": 3},
    "num_pairs: expected an int, got NoneType": {"segment_ids": torch.zeros(2 * P, S, dtype=torch.int64)},
    "segment_ids: expected from 0 to 2 num_pairs - 1, 1, got 2": {
        "segment_ids": torch.full((2 * P, S), 2),
        "num_pairs": 1,
        "reference_logprob": torch.zeros(2),
    },
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message):
    hidden, weight, labels, compared = batch()
    options = {"reference_logprob": compared, **ERRORS[message]}
    with pytest.raises((ValueError, TypeError), match=f"^{message}"):
        linear_preference_loss(hidden, weight, labels, **options)
    with pytest.raises((ValueError, TypeError), match=f"^{message}"):
        preference_loss(compared, **options)


def test_errors_of_layouts_and_references():
    hidden, weight, labels, compared = batch()
    with pytest.raises(ValueError, match=r"^logprob: expected 2 P rows of tokens, .* got \[5, 7\]: packed tokens need"):
        preference_loss(compared[1:])
    with pytest.raises(ValueError, match=r"^labels: expected 2 P rows of tokens, .* got \[7\]"):
        linear_preference_loss(hidden[0], weight, labels[0])
    text = "reference_logprob: expected None where reference_hidden is given, got a Tensor"
    with pytest.raises(ValueError, match=f"^{text}"):
        linear_preference_loss(hidden, weight, labels, reference_logprob=compared, reference_hidden=hidden)
    with pytest.raises(ValueError, match=r"^reference_hidden: expected a Tensor where reference_weight is given"):
        linear_preference_loss(hidden, weight, labels, reference_weight=weight)
    text = r"reference_hidden: expected \[..., H\] with H = 5, the width of reference_weight, got \[6, 7, 4\]"
    with pytest.raises(ValueError, match=f"^{text}"):
        linear_preference_loss(hidden, weight, labels, reference_hidden=hidden[..., 1:])
    with pytest.raises(ValueError, match=r"^reference_bias: expected \[V\] = \[29\], got \[4\]"):
        linear_preference_loss(
            hidden, weight, labels, reference_hidden=hidden, reference_weight=weight, reference_bias=weight[0, 1:]
        )


JUDGED = {
    "kind: expected one of 'kto', 'apo_zero_unpaired', got 'bco'": {"kind": "bco"},
    "kl: expected a Tensor where kind='kto', got None": {"kl": None},
    "kl: expected None where kind='apo_zero_unpaired', which has no baseline, got a Tensor": {
        "kind": "apo_zero_unpaired"
    },
    r"kl: expected \[K\], a log-ratio for each mismatched answer, or their mean \[\], got \[2, 2\]": {
        "kl": torch.zeros(2, 2)
    },
    "beta: expected a number > 0, got 0": {"beta": 0},
    "desirable_weight: expected a number >= 0, got -1": {"desirable_weight": -1},
    "undesirable_weight: expected a number, got str": {"undesirable_weight": "1"},
    r"sequence_weights: expected \[6\], one for each answer, got \[3\]": {"sequence_weights": torch.zeros(P)},
    r"reference_logprob: expected \[6\], one for each answer, got \[3\]": {"reference_logprob": torch.zeros(P)},
    "segment_ids: expected from 0 to the number of answers - 1, 5, got 6": {"segment_ids": torch.full((2 * P, S), 6)},
}


@pytest.mark.parametrize("message", JUDGED)
def test_errors_of_single_answers(message):
    hidden, weight, labels, compared = batch()
    options = {"kl": torch.zeros(()), **JUDGED[message]}
    desirable = torch.arange(2 * P) < P
    with pytest.raises((ValueError, TypeError), match=f"^{message}"):
        linear_kto_loss(hidden, weight, labels, desirable, **options)
    with pytest.raises((ValueError, TypeError), match=f"^{message}"):
        kto_loss(compared, desirable, **options)


def test_errors_of_judgements():
    logprob = torch.zeros(2 * P, S)
    with pytest.raises(TypeError, match=r"^desirable: expected bool, got torch.int64"):
        kto_loss(logprob, torch.ones(2 * P, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"^desirable: expected \[B\], one for each answer, got \[6, 1\]"):
        kto_loss(logprob, torch.ones(2 * P, 1, dtype=torch.bool))
    text = r"logprob: expected a row of tokens for each of the 5 answers, got \[6, 7\]: packed tokens need segment_ids"
    with pytest.raises(ValueError, match=f"^{text}"):
        kto_loss(logprob, torch.ones(5, dtype=torch.bool))


REWARDS = {
    "chosen_rewards: expected a Tensor, got float": {"chosen_rewards": 1.0},
    r"chosen_rewards: expected \[P\], one for each pair, got \[3, 1\]": {"chosen_rewards": torch.zeros(3, 1)},
    r"rejected_rewards: expected \[3\], one for each pair, got \[2\]": {"rejected_rewards": torch.zeros(2)},
    "rejected_rewards: expected a Tensor, got NoneType": {"rejected_rewards": None},
    r"mask: expected to broadcast to the labels' \[3\], got \[2\]": {"mask": torch.ones(2)},
    r"pair_margins: expected \[3\], one for each pair, got \[\]": {"pair_margins": torch.zeros(())},
    "center_coefficient: expected a number >= 0, got -0.1": {"center_coefficient": -0.1},
    "pair_weights: expected float32, .* got torch.int64": {"pair_weights": torch.ones(3, dtype=torch.int64)},
}


@pytest.mark.parametrize("message", REWARDS)
def test_errors_of_rewards(message):
    given = {"chosen_rewards": torch.zeros(3), "rejected_rewards": torch.zeros(3), **REWARDS[message]}
    with pytest.raises((ValueError, TypeError), match=f"^{message}"):
        bradley_terry_loss(**given)
