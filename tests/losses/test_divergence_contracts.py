"""Contracts of losses of two distributions with everything on: compiled, frozen sides, error budgets, autocast."""

from functools import partial

import pytest
import torch
from comparing import TIGHT, assert_matches
from divergence_cases import CHUNKS, DIVERGENCES, STUDENT, TEACHER, biases, cached, heads, soft_targets

from compiled_loss import Chunking, distillation, linear_distillation, linear_soft_cross_entropy, reference
from compiled_loss import masked_soft_cross_entropy as masked_soft
from compiled_loss.testing import assert_within_error_budget, count_graphs

FORMS = ["heads jsd", "heads forward_kl, none", "heads reverse_kl", "logits jsd", "top jsd", "top forward_kl, none"]
FORMS += ["logits top reverse_kl", "soft logits", "soft teacher", "soft draft vocabulary", "soft target_probs"]


def call(name, dtype=torch.float32):
    """(function, tensors): everything on, a function of all tensors that have a gradient and of the mask."""
    shape, vocab = (3, 5), 13
    tensors, labels = heads(shape, 4, 6, vocab, dtype=dtype, scale=0.5)
    own = biases(vocab, dtype)
    weights = torch.rand(shape).to(dtype).requires_grad_()
    mask = torch.randint(0, 3, shape)
    reduction = {"reduction": "none"} if name.endswith("none") else {}
    if name.startswith("soft"):
        keywords = {**STUDENT, "temperature": 0.6, **reduction}
        if name == "soft logits":
            logits, target = (torch.randn(*shape, vocab).to(dtype).requires_grad_() for _ in range(2))
            return lambda z, p, t, m: masked_soft(z, p, m, token_weights=t, **keywords), (logits, target, weights, mask)
        target = name.removeprefix("soft ")
        keywords |= soft_targets(target, shape, vocab, 6, dtype)
        if target != "target_probs":
            keywords |= {**TEACHER, "teacher_bias": torch.randn(len(keywords["teacher_weight"])).to(dtype)}

        def soft(h, w, b, t, m):
            return linear_soft_cross_entropy(h, w, m, bias=b, token_weights=t, chunking=CHUNKS, **keywords)

        return soft, (*tensors[:2], own["bias"], weights, mask)
    keywords = {"divergence": name.split(",")[0].split()[-1], "temperature": 0.6, "hard_label_weight": 0.3}
    keywords |= {**STUDENT, "shift": 1, **reduction}
    top = {"teacher_topk": cached(*tensors[2:], 5, 0.6)}
    if name.startswith("logits"):
        logits = (tensors[0] @ tensors[1].t()).detach().requires_grad_()
        teacher = None if "top" in name else (tensors[2] @ tensors[3].t()).detach()
        keywords |= top if "top" in name else TEACHER
        return lambda z, t, m: distillation(z, teacher, labels, token_weights=t, mask=m, **keywords), (
            logits,
            weights,
            mask,
        )
    teacher = [None, None] if name.startswith("top") else tensors[2:]
    keywords |= top if name.startswith("top") else {**TEACHER, "teacher_bias": own["teacher_bias"]}

    def loss(h, w, b, t, m):
        return linear_distillation(h, w, *teacher, labels, bias=b, token_weights=t, mask=m, chunking=CHUNKS, **keywords)

    return loss, (*tensors[:2], own["bias"], weights, mask)


IN_CI = ("heads jsd", "logits jsd", "soft teacher")  # the others' compilation takes its time
SOME = [n if n in IN_CI else pytest.param(n, marks=pytest.mark.slow) for n in FORMS]


@pytest.mark.parametrize("name", SOME)
def test_compiled(name):
    """One graph, the eager numbers, and another mask compiles nothing."""
    function, inputs = call(name)
    wanted = [v for v in inputs if v.requires_grad]
    assert_matches(torch.compile(function, fullgraph=True), function, inputs, wanted, rtol=1e-5, atol=1e-6)
    assert count_graphs(function, [inputs, (*inputs[:-1], torch.zeros_like(inputs[-1]))]) == 1


@pytest.mark.parametrize("name", SOME)
def test_traced(name):
    """What the compiler is given, without Inductor."""
    function, inputs = call(name, torch.float64)
    wanted = [v for v in inputs if v.requires_grad]
    assert_matches(torch.compile(function, fullgraph=True, backend="aot_eager"), function, inputs, wanted, **TIGHT)


@pytest.mark.parametrize("name", FORMS)
def test_autograd(name):
    """gradcheck, functorch, backward twice, no second derivative."""
    function, inputs = call(name, torch.float64)
    assert torch.autograd.gradcheck(function, inputs)
    wanted = [v for v in inputs if v.requires_grad]
    loss = function(*inputs)
    upstream = torch.rand_like(loss)
    first = torch.autograd.grad(loss, wanted, upstream, retain_graph=True)
    twice = torch.autograd.grad(loss, wanted, 2 * upstream, retain_graph=True)
    for a, b in zip(first, twice, strict=True):
        torch.testing.assert_close(2 * a, b, **TIGHT)
    with pytest.raises(RuntimeError, match=r"^create_graph: expected False"):
        torch.autograd.grad(loss, wanted, upstream, create_graph=True)
    plain = [v.detach() for v in inputs]
    found = torch.func.grad(lambda *i: (function(*i) * upstream).sum(), tuple(range(len(wanted))))(*plain)
    for mine, theirs in zip(found, first, strict=True):
        torch.testing.assert_close(mine, theirs, **TIGHT)


@pytest.mark.parametrize("wanted", ["hidden", "weight", "bias", "token_weights"])
@pytest.mark.parametrize("name", ["heads jsd", "heads forward_kl, none", "soft teacher"])
def test_one_gradient_alone(name, wanted):
    """The others' GEMMs are not run; the number is the same."""
    function, inputs = call(name, torch.float64)
    i = ["hidden", "weight", "bias", "token_weights"].index(wanted)
    loss = function(*inputs)
    expected = torch.autograd.grad(loss.sum(), inputs[i])[0]
    alone = [v.detach().requires_grad_(j == i) if v.is_floating_point() else v for j, v in enumerate(inputs)]
    torch.testing.assert_close(torch.autograd.grad(function(*alone).sum(), alone[i])[0], expected, **TIGHT)


@pytest.mark.parametrize("form", ["heads", "logits"])
def test_changing_options_recompile_once(form):
    """Annealed options are data, not constants."""
    tensors, labels = heads((9,), 4, 6, 13, dtype=torch.float32)
    logits = [(tensors[i] @ tensors[i + 1].t()).detach().requires_grad_() for i in (0, 2)]

    def loss(t):
        options = {"softcap": 20 * t, "logit_scale": t, "teacher_softcap": 30 * t, "teacher_logit_scale": 2 * t}
        options |= {"temperature": 1 + t, "hard_label_weight": t / 2}
        if form == "logits":
            return distillation(*logits, labels, **options)
        return linear_distillation(*tensors, labels, chunking=CHUNKS, **options)

    values = [0.9, 0.8, 0.7, 0.6]
    assert count_graphs(loss, [(t,) for t in values], backend="aot_eager") <= 2
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for t in values:
        torch.testing.assert_close(compiled(t), loss(t))


def measured(divergence, form, dtype):
    """(loss, gradients) of the library, of the reference in its dtype, and of the reference in fp64."""
    tensors, labels = heads((224,), 32, 24, 448, dtype=dtype, scale=0.5)
    own = biases(448, dtype)
    weights = torch.rand(224, dtype=torch.float64).to(dtype).requires_grad_()
    keywords = {"divergence": divergence, "temperature": 1.5, "hard_label_weight": 0.2, "softcap": 4.0}
    keywords |= {"logit_scale": 0.5}
    teacher = (*tensors[2:], own["teacher_bias"])
    if form.startswith("top"):
        keywords["teacher_topk"] = cached(*tensors[2:], 20, 1.5, dtype)
        teacher = [None, None, None]
    else:
        keywords |= TEACHER
    if form.endswith("none"):
        keywords["reduction"] = "none"
    upstream = torch.rand(224, dtype=torch.float64) / 224 if form.endswith("none") else torch.ones(())
    given = (*tensors[:2], own["bias"], weights)
    wide = [v.detach().double().requires_grad_() for v in given]
    fast = partial(linear_distillation, chunking=Chunking(chunk_size=32))
    for fn, wanted, to in (
        (fast, given, dtype),
        (reference.linear_distillation, given, dtype),
        (reference.linear_distillation, wide, torch.float64),
    ):
        theirs = [None if v is None else v.to(to) for v in teacher]
        own = {"bias": wanted[2], "teacher_bias": theirs[2], "token_weights": wanted[3]}
        loss = fn(*wanted[:2], *theirs[:2], labels, **own, **keywords)
        yield loss.detach(), *torch.autograd.grad(loss, wanted, upstream.to(loss.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("form", ["mean", "none", "top", "top, none"])
def test_error_budget(dtype, divergence, form):
    """Contract 4, of loss, dH, dW, db and the weights' gradient; of several problems, for a scalar's error is luck."""
    results = [list(measured(divergence, form, dtype)) for _ in range(6)]
    for i, name in enumerate(("loss", "dH", "dW", "db", "weights")):
        values = [torch.stack([problem[which][i] for problem in results]) for which in range(3)]
        assert_within_error_budget(*values, name=name)


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_confident_student_keeps_its_digits(compile):
    """A difference of logits near 25 is rounded less than they are: by 1e-6 of them, where the loss is 1e-5."""
    hidden, weight = torch.eye(2), torch.tensor([[2.0, 1.0], [1.0, 2.0], [0.9, -9.0]])
    keywords = {"hard_label_weight": 1.0, "softcap": 50.0, "logit_scale": 14.0, "reduction": "none"}
    heads = (hidden, weight, hidden, weight, torch.tensor([0, 1]))
    found = linear_distillation(*heads, chunking=Chunking(compile=compile), **keywords)
    exact = [v.double() if v.is_floating_point() else v for v in heads]
    expected = reference.linear_distillation(*exact, **keywords)
    assert (expected < 2e-5).all()
    eps = torch.finfo(torch.float32).eps
    torch.testing.assert_close(found.double(), expected, rtol=100 * eps, atol=2 * eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(dtype):
    """Heads are cast once; biases and weights are used in their own dtype, and get gradients in it."""
    tensors, labels = heads((9,), 4, 6, 13, dtype=torch.float32)
    own, weights = biases(13, torch.float32), torch.rand(9, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        loss = linear_distillation(*tensors, labels, token_weights=weights, **own, **STUDENT, **TEACHER)
    assert loss.dtype == torch.float32
    found = torch.autograd.grad(loss, (*tensors[:2], own["bias"], weights))
    assert [g.dtype for g in found] == [torch.float32] * 4
