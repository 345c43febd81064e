"""A temperature a token: every loss of labels takes one, on every path, as the specification divides row by row."""

import pytest
import torch
from comparing import assert_matches
from torch._dynamo.testing import CompileCounter

import compiled_loss
from compiled_loss import Chunking, reference
from compiled_loss.testing import head_inputs

CHUNKINGS = {
    "tokens": Chunking(strategy="tokens", chunk_size=4),
    "vocab": Chunking(strategy="vocab", chunk_size=7),
    "gathered": Chunking(strategy="tokens", chunk_size=4, max_label_tokens=9),
}
SHAPES = {"of tokens": (2, 5), "of sequences": (2, 1), "of positions": (5,)}
MORE = {"plain": {}, "everything": {"softcap": 2.0, "logit_scale": 1.3, "shift": 1}}


def a_row(statistics, weight):
    return (-statistics.logprob + 0.1 * statistics.entropy + 0.01 * statistics.mean_logit.square()) * weight


def of_logits(z, weight):
    return torch.logsumexp(z, -1) * weight - z.square().mean(-1)


LOSSES = {
    "cross-entropy": lambda of, h, w, y, k: of.linear_cross_entropy(h, w, y, label_smoothing=0.1, z_loss=0.01, **k),
    "statistics": lambda of, h, w, y, k: tuple(of.linear_token_statistics(h, w, y, **k)[:4]),
    "token loss": lambda of, h, w, y, k: of.linear_token_loss(h, w, y, a_row, torch.ones(2, 5).double(), **k),
    "a loss a token": lambda of, h, w, y, k: of.linear_cross_entropy(h, w, y, reduction="none", **k),
}


def inputs(temperature_shape):
    hidden, weight, labels, bias = head_inputs(10, 6, 17, dtype=torch.float64)
    labels[3] = -100
    temperature = 0.5 + torch.rand(temperature_shape, dtype=torch.float64)
    return hidden.detach().view(2, 5, 6).requires_grad_(), weight, labels.view(2, 5), bias, temperature


def call(of, name, chunking=None, **more):
    keywords = {} if chunking is None else {"chunking": chunking}

    def loss(hidden, weight, labels, bias, temperature):
        return LOSSES[name](of, hidden, weight, labels, {**keywords, **more, "bias": bias, "temperature": temperature})

    return loss


# The token strategy has no differentiable rows.
WALKS = [(n, s) for n in LOSSES for s in CHUNKINGS if s == "vocab" or n in ("cross-entropy", "token loss")]


@pytest.mark.parametrize("more", MORE)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("name", "strategy"), WALKS)
def test_as_the_reference(name, strategy, shape, more):
    run = call(compiled_loss, name, CHUNKINGS[strategy], **MORE[more])
    assert_matches(run, call(reference, name, **MORE[more]), inputs(SHAPES[shape]))


IN_CI = ("cross-entropy", "statistics")  # the others' compilation takes its time


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("name", "strategy"), [w if w[0] in IN_CI else pytest.param(*w, marks=pytest.mark.slow) for w in WALKS]
)
def test_compiled(name, strategy, backend):
    more = MORE["everything"]
    run = torch.compile(call(compiled_loss, name, CHUNKINGS[strategy], **more), fullgraph=True, backend=backend)
    assert_matches(run, call(reference, name, **more), inputs((2, 1)))


@pytest.mark.parametrize("shape", SHAPES)
def test_losses_of_logits(shape):
    hidden, weight, labels, _, temperature = inputs(SHAPES[shape])
    logits = (hidden @ weight.t()).detach().requires_grad_()

    def losses(of, z):
        keywords = {"temperature": temperature, "softcap": 3.0, "shift": 1}
        return of.cross_entropy(z, labels, z_loss=0.1, **keywords), *of.token_statistics(z, labels, **keywords)[:4]

    for logits_, classes in ((logits, -1), (logits.movedim(-1, 1).contiguous(), 1)):

        def ours(z, classes=classes):
            found = compiled_loss.cross_entropy(
                z, labels, z_loss=0.1, temperature=temperature, softcap=3.0, shift=1, class_dim=classes
            )
            keywords = {"temperature": temperature, "softcap": 3.0, "shift": 1, "class_dim": classes}
            return found, *compiled_loss.token_statistics(z, labels, **keywords)[:4]

        leaf = logits_.detach().requires_grad_()
        assert_matches(ours, lambda z, classes=classes: losses(reference, z.movedim(classes, -1)), (leaf,))


def test_a_loss_of_logits_in_chunks():
    def run(of):
        def loss(hidden, weight, labels, bias, temperature):
            more = {"bias": bias, "temperature": temperature}
            return of.linear_logits_loss(hidden, weight, of_logits, torch.ones(2, 5).double(), **more)

        return loss

    assert_matches(run(compiled_loss), run(reference), inputs((2, 5)))


def test_multi_token_prediction():
    hidden, weight, labels, bias, temperature = inputs((2, 5))

    def loss(of):
        return lambda h, w, b: of.multi_token_prediction(
            [h, 2 * h], w, labels, bias=b, temperature=temperature, scaling_factor=1.0
        )

    assert_matches(loss(compiled_loss), loss(reference), (hidden, weight, bias))


TEACHERS = ("head", "top", "probabilities")
DIVERGENCES = ("forward_kl", "reverse_kl", {"jsd": 0.3, "total_variation": 0.5, "lk": 0.2})


_random = torch.Generator().manual_seed(3)
TEACHER = (
    torch.randn(2, 5, 4, generator=_random, dtype=torch.float64),
    torch.randn(17, 4, generator=_random, dtype=torch.float64),
)


def two_distributions(of, teacher, hidden, weight, labels, bias, temperature, **more):
    """A distillation of one teacher."""
    given, stored = TEACHER, {}
    log_p = torch.log_softmax(TEACHER[0] @ TEACHER[1].t(), -1)
    if teacher != "head":
        given = (None, None)
        stored = {"teacher_topk": tuple(log_p.topk(5))} if teacher == "top" else {"teacher_probabilities": log_p.exp()}
    more = {"bias": bias, "temperature": temperature, "softcap": 2.0, **stored, **more}
    return of.linear_distillation(hidden, weight, *given, labels, **more)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("hard", [0.0, 0.3])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("teacher", TEACHERS)
def test_two_distributions(teacher, divergence, hard, reduction):
    def loss(of, **chunking):
        more = {"divergence": divergence, "hard_label_weight": hard, "reduction": reduction, **chunking}
        return lambda *v: two_distributions(of, teacher, *v, **more)

    ours = loss(compiled_loss, chunking=Chunking(chunk_size=4))
    assert_matches(ours, loss(reference), inputs((2, 1)))


def test_two_distributions_compiled():
    def loss(of, **more):
        return lambda *v: two_distributions(of, "head", *v, hard_label_weight=0.3, **more)

    ours = torch.compile(
        loss(compiled_loss, chunking=Chunking(max_label_tokens=9)), fullgraph=True, backend="aot_eager"
    )
    assert_matches(ours, loss(reference), inputs((2, 5)))


def test_two_distributions_of_logits():
    hidden, weight, labels, _, temperature = inputs((2, 5))
    student = (hidden @ weight.t()).detach()
    teacher = torch.randn_like(student)
    for classes in (-1, 1):

        def loss(of, classes=classes):
            def call(z):
                where = {"class_dim": classes} if of is compiled_loss else {}
                beside = teacher.movedim(-1, classes).contiguous() if where else teacher
                z = z if where else z.movedim(classes, -1)
                more = {"temperature": temperature, "divergence": "jsd", "hard_label_weight": 0.2}
                return of.distillation(z, beside, labels, **more, **where)

            return call

        leaf = student.movedim(-1, classes).contiguous().requires_grad_()
        assert_matches(loss(compiled_loss), loss(reference), (leaf,))


@pytest.mark.parametrize("kind", ["teacher", "probabilities", "logits"])
def test_soft_cross_entropy(kind):
    hidden, weight, labels, _, temperature = inputs((2, 5))
    probabilities = torch.rand(2, 5, 17, dtype=torch.float64).requires_grad_()
    teacher = {"teacher_hidden": TEACHER[0], "teacher_weight": TEACHER[1]}
    mask = (labels != -100).unsqueeze(-1)

    def loss(of):
        def call(hidden, weight, probabilities):
            if kind == "logits":
                return of.masked_soft_cross_entropy(hidden @ weight.t(), probabilities, mask, temperature=temperature)
            beside = teacher if kind == "teacher" else {"target_probs": probabilities.detach()}
            return of.linear_soft_cross_entropy(hidden, weight, mask, temperature=temperature, **beside)

        return call

    wanted = [hidden, weight, *([probabilities] if kind == "logits" else [])]
    assert_matches(loss(compiled_loss), loss(reference), (hidden, weight, probabilities), wanted)


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.hessian])
def test_under_functorch(transform):
    hidden, weight, labels, bias, temperature = inputs((2, 5))
    found, expected = (
        transform(lambda h, of=of: call(of, "cross-entropy")(h, weight, labels, bias, temperature))(hidden.detach())
        for of in (compiled_loss, reference)
    )
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("strategy", CHUNKINGS)
def test_what_ignored_tokens_have_is_not_looked_at(strategy):
    hidden, weight, labels, bias, temperature = inputs((2, 5))
    run = call(compiled_loss, "cross-entropy", CHUNKINGS[strategy])
    expected = torch.autograd.grad(run(hidden, weight, labels, bias, temperature), [hidden, weight])
    for poison in (0.0, -1.0, float("nan"), float("inf")):
        poisoned = temperature.clone()
        poisoned[labels == -100] = poison
        found = torch.autograd.grad(run(hidden, weight, labels, bias, poisoned), [hidden, weight])
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_other_dtypes(dtype):
    hidden, weight, labels, bias, temperature = inputs((2, 1))
    run = call(compiled_loss, "cross-entropy", CHUNKINGS["tokens"])
    low = [v.detach().to(dtype) for v in (hidden, weight)]
    truth = call(reference, "cross-entropy")(*[v.double() for v in low], labels, bias, temperature.to(dtype).double())
    found = run(low[0], low[1].requires_grad_(), labels, bias.float(), temperature.to(dtype))
    torch.testing.assert_close(found.double(), truth, rtol=8 * torch.finfo(dtype).eps, atol=0)


def test_equal_temperatures_are_one_number():
    hidden, weight, labels, bias, _ = inputs((2, 5))
    for strategy in CHUNKINGS.values():
        run = call(compiled_loss, "cross-entropy", strategy, softcap=2.0)
        one = run(hidden, weight, labels, bias, 0.7)
        each = run(hidden, weight, labels, bias, torch.full((2, 5), 0.7, dtype=torch.float64))
        torch.testing.assert_close(each, one, rtol=1e-14, atol=0)


def test_another_temperature_compiles_nothing():
    hidden, weight, labels, bias, temperature = inputs((2, 5))
    counter = CompileCounter()
    run = torch.compile(call(compiled_loss, "cross-entropy"), backend=counter, fullgraph=True)
    for factor in (1.0, 1.5, 2.0):
        run(hidden, weight, labels, bias, temperature * factor)
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("temperature", "error", "text"),
    [
        (torch.ones(2, 4), ValueError, r"temperature: expected to broadcast to the labels' \[2, 5\], got \[2, 4\]"),
        (torch.ones(2, 5, dtype=torch.int64), TypeError, "temperature: expected float32, .* got torch.int64"),
        (torch.ones(2, 5, requires_grad=True), ValueError, r"temperature: expected .* without gradient.*\.detach\(\)"),
        (torch.zeros(2, 5), ValueError, r"temperature: expected numbers > 0 where tokens count, got 0\.0"),
        (torch.ones(2, 5, device="meta"), ValueError, "temperature: expected on cpu like the first argument, got meta"),
    ],
)
def test_errors(temperature, error, text):
    hidden, weight, labels, bias, _ = inputs((2, 5))
    with pytest.raises(error, match=text):
        call(compiled_loss, "cross-entropy")(hidden, weight, labels, bias, temperature)


def test_labels_that_are_probabilities_take_one():
    with pytest.raises(ValueError, match=r"^temperature: expected a number where labels are probabilities"):
        compiled_loss.cross_entropy(torch.zeros(2, 3), torch.zeros(2, 3), temperature=torch.ones(2))


def test_one_that_cannot_be_read_makes_its_token_nan():
    hidden, weight, labels, bias, temperature = inputs((2, 5))
    temperature[1, 2] = 0.0
    run = torch.compile(call(compiled_loss, "a loss a token"), backend="eager", fullgraph=True)
    assert run(hidden, weight, labels, bias, temperature).isnan().nonzero().tolist() == [[1, 2]]
