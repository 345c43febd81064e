"""What is ignored is never looked at: any number in any place of any argument that belongs to an ignored token.

Each loss is compared with the reference on inputs without poison, in fp64, and each gradient is 0 where it is ignored.
"""

import itertools

import pytest
import torch
from comparing import TIGHT

import compiled_loss
from compiled_loss import Chunking, reference
from compiled_loss.reference import token_logits

B, S, H, V, K = 2, 9, 5, 17, 4
FILLS = {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf")}
ANY_LABEL = 10**9


def tokens(shift):
    """Labels, a mask, and which places are ignored: of labels [B, S], and of what predicts them [B, S]."""
    torch.manual_seed(0)
    labels = torch.randint(0, V, (B, S))
    labels[0, 2] = labels[1, :3] = -100
    mask = torch.ones(B, S, dtype=torch.float64)
    mask[0, 5] = mask[1, 8] = 0
    mask[0, 7] = 0.5
    ignored = (labels == -100) | (mask == 0)
    ignored[:, :shift] = True
    rows = ignored.roll(-shift, 1)
    return labels, mask, ignored, rows


def head(teacher=False):
    hidden = torch.randn(B, S, H, dtype=torch.float64)
    weight = torch.randn(V, H, dtype=torch.float64)
    return hidden.requires_grad_(not teacher), weight.requires_grad_(not teacher)


def hard(name, **keywords):
    """Cross-entropy and statistics, on logits or on a head: (inputs, places that are ignored, keywords)."""
    shift = keywords.pop("shift", 0)
    labels, mask, ignored, rows = tokens(shift)
    hidden, weight = head()
    inputs, places = {"hidden": hidden, "weight": weight}, {"hidden": rows}
    if not name.startswith("linear"):
        inputs = {"logits": token_logits(hidden, weight).detach().requires_grad_()}
        places = {"logits": rows}
    inputs |= {"labels": labels, "mask": mask}
    places |= {"labels": mask == 0, "mask": labels == -100}
    if "statistics" not in name or "cross_entropy" in name:
        inputs["token_weights"] = torch.rand(B, S, dtype=torch.float64).requires_grad_()
        places["token_weights"] = ignored
    return inputs, places, keywords | {"shift": shift}


def pair(name, teacher, **keywords):
    """Distillation and soft cross-entropy; "weighted" with a mask, weights and a bias, on heads."""
    weighted, shift = keywords.pop("weighted", False), keywords.get("shift", 0)
    labels, mask, ignored, rows = tokens(shift)
    hidden, weight = head()
    teacher_hidden, teacher_weight = head(teacher=True)
    soft = "soft" in name
    counts = rows if soft or weighted else labels == -100
    inputs = {"hidden": hidden, "weight": weight} if soft else {"student_hidden": hidden, "student_weight": weight}
    logits = token_logits(teacher_hidden, teacher_weight)
    if not name.startswith("linear"):
        inputs = {"logits" if soft else "student_logits": token_logits(hidden, weight).detach().requires_grad_()}
    names = [next(iter(inputs))]
    if soft:
        inputs["position_mask"] = torch.where(ignored, 0.0, mask)
    if teacher == "head":
        inputs |= {"teacher_hidden": teacher_hidden, "teacher_weight": teacher_weight}
        names.append("teacher_hidden")
    elif teacher == "probabilities":
        inputs["target_probs"] = logits.softmax(-1).requires_grad_(not name.startswith("linear"))
        names.append("target_probs")
    elif teacher == "top":
        values, indices = logits.log_softmax(-1).topk(K)
        inputs |= {"values": values, "indices": indices}
        inputs |= {k: None for k in (("teacher_hidden", "teacher_weight") if "linear" in name else ("teacher_logits",))}
        names += ["values", "indices"]
    else:
        inputs["teacher_logits"] = logits
        names.append("teacher_logits")
    places = dict.fromkeys(names, counts)
    if not soft:
        inputs["labels"] = labels
    if weighted:
        inputs["token_weights"] = torch.rand(B, S, dtype=torch.float64).requires_grad_()
        places["token_weights"] = ignored
        if not soft:
            inputs["mask"] = mask
            places |= {"mask": labels == -100, "labels": mask == 0}
        if name.startswith("linear"):
            inputs["bias"] = torch.randn(V, dtype=torch.float64).requires_grad_()
    return inputs, places, keywords


def probable(name, **keywords):
    """Cross-entropy whose labels are probabilities, which a mask alone ignores."""
    _, mask, *_ = tokens(0)
    logits, labels = (token_logits(*head()).detach() for _ in range(2))
    inputs = {"logits": logits.requires_grad_(), "labels": labels.softmax(-1).requires_grad_(), "mask": mask}
    inputs["token_weights"] = torch.rand(B, S, dtype=torch.float64).requires_grad_()
    return inputs, dict.fromkeys(("logits", "labels", "token_weights"), mask == 0), keywords


def depths(name, **keywords):
    """Multi-token prediction, whose targets are ignored at the end of a sequence."""
    labels, *_ = tokens(0)
    hidden, weight = head()
    targets = [reference.multi_token_targets(labels, k) for k in range(2)]
    inputs = {"hidden": hidden, "deeper": head()[0], "weight": weight, "labels": labels}
    return inputs, {"hidden": targets[0] == -100, "deeper": targets[1] == -100}, keywords


EVERYTHING = {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 5.0, "temperature": 0.7}
WEIGHTED = {"weighted": True, "hard_label_weight": 0.3}
SOFT_WEIGHTED = {"weighted": True, "softcap": 3.0, "temperature": 0.7}
CAPPED = {"softcap": 3.0, "logit_scale": 0.5, "teacher_softcap": 4.0, "teacher_logit_scale": 2.0}
TOKENS, COLUMNS = Chunking(strategy="tokens", chunk_size=4), Chunking(strategy="vocab", chunk_size=6)
CASES = {
    "cross_entropy": (hard, {}),
    "cross_entropy, everything": (hard, EVERYTHING | {"shift": 1}),
    "cross_entropy, none": (hard, {"reduction": "none"}),
    "linear_cross_entropy, tokens": (hard, {"chunking": TOKENS}),
    "linear_cross_entropy, tokens, everything": (hard, EVERYTHING | {"chunking": TOKENS, "shift": 1}),
    "linear_cross_entropy, vocab": (hard, {"chunking": COLUMNS, "shift": 2}),
    "linear_cross_entropy, vocab, everything": (hard, EVERYTHING | {"chunking": COLUMNS}),
    "linear_cross_entropy, none": (hard, {"reduction": "none"}),
    "linear_cross_entropy, few": (hard, {"chunking": Chunking(strategy="tokens", max_label_tokens=14)}),
    "linear_token_statistics": (hard, {"chunking": COLUMNS}),
    "token_statistics": (hard, {"shift": 1, "softcap": 5.0}),
    "cross_entropy, probabilities": (probable, {}),
    "cross_entropy, probabilities, everything": (probable, EVERYTHING | {"reduction": "none"}),
    **{
        f"{name}, {divergence}": (pair, {"divergence": divergence, **keywords})
        for divergence in ("forward_kl", "reverse_kl", "jsd")
        for name, keywords in {
            "distillation": {"teacher": "logits", "hard_label_weight": 0.3},
            "distillation, none": {"teacher": "logits", "reduction": "none", "temperature": 2.0},
            "distillation, top": {"teacher": "top", "hard_label_weight": 0.3},
            "linear_distillation": {"teacher": "head", "hard_label_weight": 0.3, "chunking": TOKENS},
            "linear_distillation, none": {"teacher": "head", "reduction": "none", "chunking": TOKENS},
            "linear_distillation, top": {"teacher": "top", "chunking": TOKENS},
            "linear_distillation, top, none": {"teacher": "top", "reduction": "none", "chunking": TOKENS},
            "distillation, weighted": {"teacher": "logits", **WEIGHTED, **CAPPED, "shift": 1},
            "distillation, top, weighted": {"teacher": "top", **WEIGHTED, "softcap": 3.0, "reduction": "none"},
            "linear_distillation, weighted": {"teacher": "head", "chunking": TOKENS, **WEIGHTED, **CAPPED, "shift": 2},
            "linear_distillation, weighted, none": {
                **{"teacher": "head", "chunking": TOKENS, "reduction": "none"},
                **WEIGHTED,
                **CAPPED,
            },
            "linear_distillation, top, weighted": {"teacher": "top", "chunking": TOKENS, **WEIGHTED, "softcap": 3.0},
            "linear_distillation, few, weighted": {
                **{"teacher": "head", "chunking": Chunking(max_label_tokens=15), "shift": 1},
                **WEIGHTED,
            },
            "linear_distillation, few": {"teacher": "head", "chunking": Chunking(max_label_tokens=15)},
        }.items()
    },
    "masked_soft_cross_entropy": (pair, {"teacher": "probabilities"}),
    "linear_soft_cross_entropy": (pair, {"teacher": "probabilities", "chunking": TOKENS}),
    "linear_soft_cross_entropy, head": (pair, {"teacher": "head", "chunking": TOKENS}),
    "masked_soft_cross_entropy, weighted": (pair, {"teacher": "probabilities", **SOFT_WEIGHTED}),
    "linear_soft_cross_entropy, weighted": (pair, {"teacher": "head", "chunking": TOKENS, **SOFT_WEIGHTED}),
    "linear_soft_cross_entropy, none": (
        pair,
        {"teacher": "probabilities", "chunking": TOKENS, "reduction": "none", **SOFT_WEIGHTED},
    ),
    "linear_soft_cross_entropy, few": (pair, {"teacher": "probabilities", "chunking": Chunking(max_label_tokens=15)}),
    "multi_token_prediction": (depths, {"chunking": TOKENS}),
}
ARGUMENTS = {name: list(make(name, **keywords)[1]) for name, (make, keywords) in CASES.items()}


def poisoned(value, ignored, fill):
    """A copy that holds `fill` where it is ignored."""
    value = value.detach().clone().requires_grad_(value.requires_grad)
    with torch.no_grad():
        value[ignored] = fill if value.is_floating_point() else ANY_LABEL if fill > 0 else -7
    return value


def called(lib, name, inputs, keywords):
    """The loss, or all that a function returns, as a list."""
    inputs = dict(inputs)
    if "values" in inputs:
        inputs["teacher_topk"] = (inputs.pop("values"), inputs.pop("indices"))
    if "deeper" in inputs:
        inputs["hidden"] = [inputs["hidden"], inputs.pop("deeper")]
    if lib is reference:
        keywords = {k: v for k, v in keywords.items() if k != "chunking"}
    found = getattr(lib, name.split(",")[0])(**inputs, **keywords)
    return [v for v in found if v is not None and v.requires_grad] if isinstance(found, tuple) else [found]


def weighed(values):
    """One number, in which each token's loss has another weight."""
    return sum((v * torch.arange(1, v.numel() + 1, dtype=v.dtype).reshape(v.shape)).sum() for v in values)


def outcome(lib, name, inputs, keywords, run=called):
    """Values, and the gradients of those inputs that require one."""
    values = run(lib, name, inputs, keywords)
    wanted = {k: v for k, v in inputs.items() if v is not None and v.requires_grad}
    return values, dict(zip(wanted, torch.autograd.grad(weighed(values), list(wanted.values())), strict=True))


def check(name, changed, fill, run=called):
    make, keywords = CASES[name]
    inputs, places, keywords = make(name, **keywords)
    values, gradients = outcome(reference, name, inputs, keywords)
    for argument in changed:
        inputs[argument] = poisoned(inputs[argument], places[argument], fill)
    found, mine = outcome(compiled_loss, name, inputs, keywords, run)
    torch.testing.assert_close(found, values, **TIGHT)
    for argument in places.keys() & gradients.keys():
        assert (mine[argument][places[argument]] == 0).all(), argument
        gradients[argument][places[argument]] = 0
    torch.testing.assert_close(mine, gradients, **TIGHT)


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("name", CASES)
def test_nan_and_inf_in_ignored_tokens(name, fill):
    """All arguments, and with NaN each alone."""
    alone = [[argument] for argument in ARGUMENTS[name]] if fill == "nan" else []
    for changed in [*alone, ARGUMENTS[name]]:
        check(name, changed, FILLS[fill])


@pytest.mark.parametrize("name", CASES)
def test_nan_in_ignored_tokens_under_torch_func(name):
    """Where losses are composed of plain operators."""
    make, keywords = CASES[name]
    inputs, places, keywords = make(name, **keywords)
    _, expected = outcome(reference, name, inputs, keywords)
    inputs |= {argument: poisoned(inputs[argument], places[argument], float("nan")) for argument in places}

    def total(wanted):
        return weighed(called(compiled_loss, name, inputs | wanted, keywords))

    found = torch.func.grad(total)({k: inputs[k].detach() for k in expected})
    for argument, theirs in expected.items():
        if argument in places:
            theirs = theirs.masked_fill(
                places[argument].reshape(*places[argument].shape, *(1,) * (theirs.dim() - 2)), 0
            )
        torch.testing.assert_close(found[argument], theirs, **TIGHT)


COMPILED = [
    "cross_entropy, everything",
    "linear_cross_entropy, tokens",
    "linear_cross_entropy, vocab",
    "distillation, jsd",
    "linear_distillation, top, forward_kl",
    "masked_soft_cross_entropy",
]


@pytest.mark.parametrize(
    ("backend", "name"),
    [
        pytest.param(b, n, marks=[pytest.mark.slow] * (b == "aot_eager" or n not in COMPILED))
        for b, n in itertools.product(("aot_eager", "inductor"), CASES)
    ],
)
def test_nan_in_ignored_tokens_compiled(name, backend):
    def run(lib, name, inputs, keywords):
        names = list(inputs)

        def step(*tensors):
            return called(lib, name, dict(zip(names, tensors, strict=True)), keywords)

        return torch.compile(step, fullgraph=True, backend=backend)(*inputs.values())

    torch._dynamo.reset()
    check(name, ARGUMENTS[name], float("nan"), run)
