"""A few classes of each token: log-probabilities of given ones, the model's own top, statistics over those kept."""

import pytest
import torch
from comparing import assert_matches, assert_same

import compiled_loss
from compiled_loss import Chunking, linear_policy_loss, linear_token_statistics, pad_ids, reference
from compiled_loss.testing import head_inputs

VOCAB = 23
EVERY = ("logprob", "logsumexp", "entropy", "correct", "log_sum_sq_probs", "first_argmax")
MORE = {"plain": {}, "everything": {"softcap": 2.0, "logit_scale": 1.3, "temperature": torch.tensor([[0.7], [1.2]])}}


def inputs(count=10):
    hidden, weight, labels, bias = head_inputs(count, 7, VOCAB, dtype=torch.float64)
    labels[1] = -100
    rows = (2, count // 2)
    return hidden.detach().view(*rows, 7).requires_grad_(), weight, labels.view(rows), bias


def ids_of(rows, k, padded=2):
    """Distinct classes of each token, the last ones of the first token padding."""
    random = torch.Generator().manual_seed(1)
    ids = torch.stack([torch.randperm(VOCAB, generator=random)[:k] for _ in range(rows[0] * rows[1])])
    ids[0, k - padded :] = -1
    return ids.view(*rows, k)


def finite(statistics):
    """What can be differentiated: without the -inf of padding."""
    found = [v for v in statistics[:-1] if v is not None]
    return tuple([torch.where(v.isinf(), 0.0, v) if v.is_floating_point() else v for v in found])


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("more", MORE)
@pytest.mark.parametrize("asked", ["of each", "of all", "kept", "kept and of each"])
def test_as_the_reference(asked, more, compiled):
    hidden, weight, labels, bias = inputs()
    own = ids_of(labels.shape, 6)
    keywords = {
        "of each": {"ids": own},
        "of all": {"ids": torch.tensor([3, 0, VOCAB - 1, 3])},
        "kept": {"kept_ids": own},
        "kept and of each": {"kept_ids": own, "ids": own.flip(-1)[..., :3]},
    }[asked]

    def run(of):
        def statistics(hidden, weight, bias):
            return of.linear_token_statistics(hidden, weight, labels, bias=bias, wanted=EVERY, **keywords, **MORE[more])

        return statistics

    ours, truth = run(compiled_loss), run(reference)
    ours = torch.compile(ours, fullgraph=True, backend="aot_eager") if compiled else ours
    found, expected = ours(hidden, weight, bias), truth(hidden, weight, bias)
    if "ids" in keywords:
        torch.testing.assert_close(found.ids_logprob.isinf(), expected.ids_logprob.isinf())
    assert_same(finite(found), finite(expected), [hidden, weight, bias])


@pytest.mark.slow
def test_compiled_by_inductor():
    hidden, weight, labels, bias = inputs()
    own = ids_of(labels.shape, 6)

    def run(of):
        return lambda h, w, b: finite(of.linear_token_statistics(h, w, labels, bias=b, kept_ids=own, ids=own))

    assert_matches(torch.compile(run(compiled_loss), fullgraph=True), run(reference), (hidden, weight, bias))


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("more", MORE)
@pytest.mark.parametrize("chunking", ["tokens", "vocab", "gathered", "compiled"])
def test_the_models_own_top(chunking, more, with_bias):
    """In chunks of fewer columns than are wanted, too."""
    hidden, weight, labels, bias = inputs()
    bias = bias if with_bias else None
    how = {
        "tokens": Chunking(strategy="tokens", chunk_size=3),
        "vocab": Chunking(strategy="vocab", chunk_size=3),
        "gathered": Chunking(strategy="vocab", chunk_size=9, max_label_tokens=9),
        "compiled": Chunking(),
    }[chunking]
    if chunking == "tokens":  # which forms no gradient of rows
        hidden, weight, bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()

    def statistics(hidden, weight):
        return linear_token_statistics(hidden, weight, labels, bias=bias, top_k=5, chunking=how, **MORE[more])

    run = torch.compile(statistics, fullgraph=True, backend="aot_eager") if chunking == "compiled" else statistics
    found = run(hidden, weight)
    expected = reference.linear_token_statistics(hidden, weight, labels, bias=bias, top_k=5, **MORE[more])
    torch.testing.assert_close(tuple(found.top_k), expected.top_k, rtol=1e-11, atol=1e-12)
    assert not found.top_k.logprob.requires_grad
    torch.testing.assert_close(found.logprob, expected.logprob, rtol=1e-11, atol=1e-12)


def test_the_top_is_a_teacher():
    """What a pass over the teacher gives is what distillation takes."""
    hidden, weight, labels, _ = inputs()
    teacher_hidden, teacher_weight, *_ = inputs()
    with torch.no_grad():
        cached = linear_token_statistics(teacher_hidden, teacher_weight, labels, temperature=2.0, top_k=VOCAB).top_k
    found = compiled_loss.linear_distillation(
        hidden, weight, None, None, labels, teacher_topk=tuple(cached), temperature=2.0
    )
    whole = compiled_loss.linear_distillation(hidden, weight, teacher_hidden, teacher_weight, labels, temperature=2.0)
    torch.testing.assert_close(found, whole, rtol=1e-11, atol=1e-12)


def test_keeping_all_classes_keeps_the_statistics():
    hidden, weight, labels, bias = inputs()
    every = torch.arange(VOCAB).expand(*labels.shape, VOCAB)
    kept, whole = (
        linear_token_statistics(hidden, weight, labels, bias=bias, wanted=EVERY, **more)
        for more in ({"kept_ids": every}, {})
    )
    assert_same(finite(kept), finite(whole), [hidden, weight, bias])


def test_keeping_the_label_alone_makes_it_certain():
    hidden, weight, labels, _ = inputs()
    none = torch.full((*labels.shape, 1), -1)
    found = linear_token_statistics(hidden, weight, labels, kept_ids=none)
    assert (found.logprob == 0).all() and (found.entropy == 0).all()
    d = torch.autograd.grad(found.logprob.sum() + found.entropy.sum(), [hidden, weight])
    assert all((v == 0).all() for v in d)


def test_ratios_over_what_a_sampler_kept_are_not_biased():
    """A sampler of the top half: with its support the mean ratio of an unchanged policy is 1, over V it is its mass."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(4000, 7), torch.randn(VOCAB, 7)
    top = torch.log_softmax(hidden @ weight.t(), -1).topk(VOCAB // 2, -1)
    place = torch.multinomial(top.values.softmax(-1), 1)
    labels, old = top.indices.gather(-1, place)[:, 0], top.values.log_softmax(-1).gather(-1, place)[:, 0]
    ratios = [
        (linear_token_statistics(hidden, weight, labels, **more).logprob - old).exp().mean()
        for more in ({"kept_ids": top.indices}, {})
    ]
    torch.testing.assert_close(ratios[0], torch.tensor(1.0), rtol=1e-5, atol=0)
    assert ratios[1] < 0.97


@pytest.mark.parametrize("importance", ["token", "sequence"])
def test_policy_loss_over_what_was_kept(importance):
    hidden, weight, labels, bias = inputs()
    kept = ids_of(labels.shape, 6)
    old = linear_token_statistics(hidden, weight, labels, bias=bias, kept_ids=kept).logprob.detach() + 0.1
    advantages = torch.randn(2, 5, dtype=torch.float64)
    more = {"importance": importance, "entropy_coefficient": 0.1}

    def ours(hidden, weight, bias):
        return linear_policy_loss(hidden, weight, labels, old, advantages, bias=bias, kept_ids=kept, **more).loss

    def truth(hidden, weight, bias):
        rows = reference.linear_token_statistics(hidden, weight, labels, bias=bias, kept_ids=kept)
        return reference.policy_loss(rows.logprob, old, advantages, entropy=rows.entropy, mask=labels != -100, **more)

    assert_matches(ours, truth, (hidden, weight, bias))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_are_gathered_in_fp32(dtype):
    hidden, weight, labels, _ = inputs()
    low = [v.detach().to(dtype).requires_grad_() for v in (hidden, weight)]
    kept = ids_of(labels.shape, 6)
    found = linear_token_statistics(*low, labels, kept_ids=kept).logprob
    exact = [v.detach().double().requires_grad_() for v in low]
    expected = reference.linear_token_statistics(*exact, labels, kept_ids=kept).logprob
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(
        torch.autograd.grad(found.sum(), low), torch.autograd.grad(expected.sum(), exact), strict=True
    ):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine.double(), theirs, rtol=2 * torch.finfo(dtype).eps, atol=1e-3)


def test_what_ignored_tokens_have_is_not_looked_at():
    hidden, weight, labels, _ = inputs()
    kept = ids_of(labels.shape, 6)
    poisoned, wrong = hidden.detach().clone(), kept.clone()
    poisoned[0, 1], wrong[0, 1] = float("nan"), VOCAB + 7
    found = []
    for h, ids in ((hidden.detach(), kept), (poisoned, wrong)):
        h.requires_grad_()
        rows = linear_token_statistics(h, weight, labels, kept_ids=ids, ids=ids)
        loss = rows.logprob.sum() + rows.entropy.sum() + torch.where(ids < 0, 0.0, rows.ids_logprob).sum()
        found.append((loss, *torch.autograd.grad(loss, [h, weight])))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.hessian])
def test_under_functorch(transform):
    hidden, weight, labels, _ = inputs()
    kept = ids_of(labels.shape, 6, padded=0)

    def loss(of):
        def total(h):
            rows = of.linear_token_statistics(h, weight.detach(), labels, kept_ids=kept, ids=kept[..., :2])
            return rows.entropy.sum() + rows.logprob.sum() + rows.ids_logprob.sum()

        return total

    found, expected = (transform(loss(of))(hidden.detach()) for of in (compiled_loss, reference))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("name", ["ids", "kept_ids"])
def test_ids_that_are_no_classes(name):
    hidden, weight, labels, _ = inputs()
    ids = ids_of(labels.shape, 4)
    ids[1, 2, 0] = VOCAB
    with pytest.raises(ValueError, match=rf"^{name}: expected < V = 23, negative for padding, got 23"):
        linear_token_statistics(hidden, weight, labels, **{name: ids})
    run = torch.compile(linear_token_statistics, fullgraph=True, backend="eager")
    found = run(hidden, weight, labels, **{name: ids})
    values = found.logprob if name == "kept_ids" else found.ids_logprob.sum(-1)
    assert values.isnan().nonzero().tolist() == [[1, 2]]


@pytest.mark.parametrize("compiled", [False, True])
def test_a_class_kept_twice_counts_once(compiled):
    hidden, weight, labels, _ = inputs()
    ids = ids_of(labels.shape, 4)
    twice = torch.cat([ids[..., 2:], ids, ids[..., :1], labels.clamp(min=0).unsqueeze(-1)], -1)
    run = (
        torch.compile(linear_token_statistics, fullgraph=True, backend="eager") if compiled else linear_token_statistics
    )
    found, expected = (run(hidden, weight, labels, kept_ids=v) for v in (twice, ids))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["ids", "kept_ids"])
def test_no_ids_at_all(name):
    hidden, weight, labels, _ = inputs()
    found = linear_token_statistics(hidden, weight, labels, **{name: labels.new_empty(*labels.shape, 0)})
    if name == "ids":
        assert found.ids_logprob.shape == (*labels.shape, 0)
    else:
        assert (found.logprob == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_log_probabilities_of_ids_are_those_of_the_same_pass(dtype):
    """The label's is its own, and those of all classes sum to 1, although logits are rounded."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(64, 64).to(dtype), torch.randn(100, 64).to(dtype)
    labels = (hidden.float() @ weight.float().t()).argmax(-1)
    found = linear_token_statistics(hidden, weight, labels, ids=labels.unsqueeze(-1))
    torch.testing.assert_close(found.ids_logprob[:, 0], found.logprob, rtol=1e-4, atol=1e-5)
    every = linear_token_statistics(hidden, weight, labels, ids=torch.arange(100)).ids_logprob
    torch.testing.assert_close(every.exp().sum(-1), torch.ones(64), rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", ["ids", "kept_ids"])
def test_more_tokens_than_were_promised(name):
    hidden, weight, labels, _ = inputs()
    more = {name: ids_of(labels.shape, 4), "chunking": Chunking(max_label_tokens=3)}
    with pytest.raises(ValueError, match=r"^max_label_tokens: "):
        linear_token_statistics(hidden, weight, labels, **more)
    found = torch.compile(linear_token_statistics, fullgraph=True, backend="eager")(hidden, weight, labels, **more)
    assert found.logprob[labels != -100].isnan().all()


def test_pad_ids():
    offsets, ids = torch.tensor([0, 2, 2, 5]), torch.tensor([4, 1, 7, 0, 3])
    assert pad_ids(offsets, ids, 3).tolist() == [[4, 1, -1], [-1, -1, -1], [7, 0, 3]]
    assert pad_ids(torch.tensor([0, 0]), ids[:0], 2).tolist() == [[-1, -1]]
    long = torch.compile(pad_ids, backend="eager", fullgraph=True)(offsets, ids.int(), 2)
    assert long.tolist()[0] == [4, 1] and (long[2] > 2**62).all()


@pytest.mark.parametrize(
    ("changed", "error", "text"),
    [
        ({"offsets": torch.zeros(0, dtype=torch.int64)}, ValueError, r"^offsets: expected \[N \+ 1\], got \[0\]"),
        ({"offsets": torch.tensor([0.0, 2.0])}, TypeError, "^offsets: expected int64 or int32, got torch.float32"),
        ({"offsets": torch.tensor([0, 2])}, ValueError, "^offsets: expected to rise from 0 to 3"),
        ({"ids": torch.zeros(2, 2, dtype=torch.int64)}, ValueError, r"^ids: expected one dimension, got \[2, 2\]"),
        ({"ids": None}, TypeError, "^ids: expected a Tensor, got NoneType"),
        ({"width": 1}, ValueError, "^width: expected >= 2, the most ids of a token, got 1"),
        ({"width": 0}, ValueError, "^width: expected an int > 0, got 0"),
        ({"width": 1.5}, TypeError, "^width: expected an int, got float"),
    ],
)
def test_errors_of_pad_ids(changed, error, text):
    given = {"offsets": torch.tensor([0, 2, 3]), "ids": torch.tensor([1, 2, 3]), "width": 2}
    with pytest.raises(error, match=text):
        pad_ids(**{**given, **changed})
