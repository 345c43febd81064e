"""Losses that users write: the specification's numbers and gradients on either strategy, and what a function may be."""

import functools

import cases
import pytest
import torch
from comparing import assert_matches
from gpu_cases import clipped, of_everything
from operators import no_operators
from torch._dynamo.testing import CompileCounter

from compiled_loss import Chunking, linear_token_loss, reference
from compiled_loss.engine import execution, user_losses
from compiled_loss.testing import head_inputs

TOKENS, WIDTH, VOCAB = 23, 7, 29
KEYWORDS = {
    "plain": {},
    "weights": {"token_weights": torch.linspace(2, 0.1, TOKENS, dtype=torch.float64)},
    "mask": {"mask": torch.arange(TOKENS) % 3 != 0, "reduction": "sum", "num_label_tokens": torch.tensor(7)},
    "head": {"softcap": 3.0, "logit_scale": 1.3, "temperature": 0.7, "shift": 2, "ignore_index": 1},
    "none": {"reduction": "none", "mask": torch.arange(TOKENS) % 4},
    "all masked": {"mask": torch.zeros(TOKENS)},
}


def batch(keywords, dtype=torch.float64):
    """(hidden, weight, labels, bias, old log-probabilities, advantages), the last of which want a gradient."""
    random = torch.Generator().manual_seed(1)
    ignore_index = keywords.get("ignore_index", -100)
    inputs = head_inputs(TOKENS, WIDTH, VOCAB, dtype=dtype, ignored=0.2, ignore_index=ignore_index)
    old = -4 + torch.randn(TOKENS, generator=random, dtype=dtype)
    return *inputs, old, torch.randn(TOKENS, generator=random, dtype=dtype).requires_grad_()


def loss(token_loss, lib=None, **keywords):
    """A function of the batch."""

    def of_batch(hidden, weight, labels, bias, old, advantages):
        call = linear_token_loss if lib is None else lib.linear_token_loss
        return call(hidden, weight, labels, token_loss, old, advantages, 0.2, 0.3, bias=bias, **keywords)

    return of_batch


@pytest.mark.parametrize("strategy", cases.CHUNKINGS)
@pytest.mark.parametrize("name", KEYWORDS)
@pytest.mark.parametrize("token_loss", [clipped, of_everything])
def test_matches_the_reference(token_loss, name, strategy):
    keywords = KEYWORDS[name]
    chunking = cases.chunking_of(strategy, keywords)
    assert_matches(
        loss(token_loss, chunking=chunking, **keywords), loss(token_loss, reference, **keywords), batch(keywords)
    )


FIRST = (("head", "tokens"), ("weights", "vocab"))
COMPILED = [(name, strategy) for name in ("plain", "weights", "head") for strategy in ("tokens", "vocab")]


@pytest.mark.parametrize(
    ("name", "strategy"), [c if c in FIRST else pytest.param(*c, marks=pytest.mark.slow) for c in COMPILED]
)
def test_compiled(name, strategy):
    keywords = KEYWORDS[name]
    run = torch.compile(loss(of_everything, chunking=cases.CHUNKINGS[strategy], **keywords), fullgraph=True)
    assert_matches(run, loss(of_everything, reference, **keywords), batch(keywords))


def test_eager_kernels():
    run = loss(of_everything, chunking=Chunking(strategy="tokens", chunk_size=5, compile=True))
    assert_matches(run, loss(of_everything, reference), batch({}))


def test_weights_get_gradients():
    hidden, weight, labels, _, old, advantages = batch({})
    weights = torch.rand(TOKENS, dtype=torch.float64, requires_grad=True)

    def of(lib):
        return lambda hidden, weights: lib(
            hidden, weight, labels, clipped, old, advantages.detach(), 0.2, 0.3, token_weights=weights
        )

    assert_matches(of(linear_token_loss), of(reference.linear_token_loss), (hidden, weights))


@pytest.mark.parametrize("strategy", ["tokens", "vocab"])
def test_ignored_tokens_may_hold_anything(strategy):
    hidden, weight, labels, _, old, advantages = batch({})
    ignored = labels == -100
    poisoned = [
        torch.where(ignored.unsqueeze(1), torch.nan, hidden.detach()).requires_grad_(),
        torch.where(ignored, torch.inf, old),
        torch.where(ignored, torch.nan, advantages.detach()).requires_grad_(),
    ]
    call = functools.partial(linear_token_loss, chunking=cases.CHUNKINGS[strategy])
    clean = call(hidden, weight, labels, of_everything, old, advantages, 0.2, 0.3)
    dirty = call(poisoned[0], weight, labels, of_everything, *poisoned[1:], 0.2, 0.3)
    assert torch.equal(clean, dirty)
    for mine, theirs in zip(
        torch.autograd.grad(dirty, [poisoned[0], weight, poisoned[2]]),
        torch.autograd.grad(clean, [hidden, weight, advantages]),
        strict=True,
    ):
        assert torch.equal(mine, theirs)


def test_inputs_of_every_shape_and_dtype():
    """[..., k] a token, integers and booleans, numbers as tensors and as Python's."""
    hidden, weight, labels, _ = head_inputs(84, WIDTH, VOCAB, dtype=torch.float64)
    hidden, labels = hidden.detach().reshape(3, 4, 7, WIDTH).requires_grad_(), labels.reshape(3, 4, 7)

    def mixed(statistics, several, kind, flag, number, scale):
        return torch.where(flag, several.sum(-1) * statistics.logprob, scale * kind * statistics.entropy) * number

    several = torch.randn(3, 4, 7, 2, dtype=torch.float64, requires_grad=True)
    kind, flag = torch.randint(0, 3, (3, 4, 7)), torch.rand(3, 4, 7) < 0.5
    more = (kind, flag, torch.tensor(2), 0.5)

    def of(lib, **keywords):
        return lambda h, w, several: lib(h, w, labels, mixed, several, *more, **keywords)

    for chunking in cases.CHUNKINGS.values():
        fn = of(linear_token_loss, chunking=chunking)
        assert_matches(fn, of(reference.linear_token_loss), (hidden, weight, several))


def test_graphs():
    """A graph for a static, one for a dynamic number of tokens, one for a number that changes."""
    execution.forget()
    counter, numbers = CompileCounter(), (0.1, 0.2, 0.3, 0.4)
    run = torch.compile(
        lambda h, w, y, old, adv, low: linear_token_loss(h, w, y, clipped, old, adv, low, 0.3, chunking=Chunking()),
        fullgraph=True,
        backend=counter,
    )
    for tokens, low in zip((13, 11, 17, 19), numbers, strict=True):
        hidden, weight, labels, _ = head_inputs(tokens, WIDTH, VOCAB)
        old, advantages = torch.randn(tokens), torch.randn(tokens)
        run(hidden, weight, labels, old, advantages, low).backward()
    assert counter.frame_count <= 3


def above(statistics, old, advantages, low):
    """Clipped with Python's numbers."""
    return -(statistics.logprob - old).exp().clamp(1 - low, 1.3) * advantages


class Clipped(torch.nn.Module):
    def __init__(self, low):
        super().__init__()
        self.low = low

    def forward(self, statistics, old, advantages, _low, high):
        return above(statistics, old, advantages, self.low)


def closure(low):
    return lambda statistics, old, advantages, _low, high: above(statistics, old, advantages, low)


def partial(low):
    def of(statistics, old, advantages, _low, high, *, mine):
        return above(statistics, old, advantages, mine)

    return functools.partial(of, mine=low)


def default(low):
    return lambda statistics, old, advantages, _low, high, mine=low: above(statistics, old, advantages, mine)


OLD = torch.__version__.startswith("2.11.")


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("made", [Clipped, closure, partial, default])
def test_functions_of_every_kind_see_their_numbers_now(made, compiled):
    """Under torch.compile as well, where nothing of what a function closes over may be remembered in silence."""
    if OLD and compiled and made is default:
        pytest.skip("Dynamo 2.11 guards no default, in any function")
    inputs = batch({})

    def of_batch(token_loss, hidden, weight, labels, bias, old, advantages):
        return linear_token_loss(hidden, weight, labels, token_loss, old, advantages, 0.9, 0.3, bias=bias)

    run = torch.compile(of_batch, fullgraph=True, backend="eager") if compiled else of_batch
    for low in (0.05, 0.1, 0.15, 0.2):
        expected = reference.linear_token_loss(*inputs[:3], above, *inputs[4:], low, bias=inputs[3])
        torch.testing.assert_close(run(made(low), *inputs), expected)


class Settings:
    """Whose number a function reads."""

    low = 0.05


def configured(statistics, old, advantages, _low, _high):
    return above(statistics, old, advantages, Settings.low)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", ["module", "class"])
def test_a_number_that_changes_elsewhere(kind, compiled, monkeypatch):
    if OLD and compiled and kind == "class":
        pytest.skip("Dynamo 2.11 guards no attribute of a class, in any function")
    inputs, module = batch({}), Clipped(0.05)

    def of_batch(hidden, weight, labels, bias, old, advantages):
        token_loss = module if kind == "module" else configured
        return linear_token_loss(hidden, weight, labels, token_loss, old, advantages, 0.9, 0.3, bias=bias)

    run = torch.compile(of_batch, fullgraph=True, backend="eager") if compiled else of_batch
    for low in (0.05, 0.1, 0.15):
        module.low = low
        monkeypatch.setattr(Settings, "low", low)
        expected = reference.linear_token_loss(*inputs[:3], above, *inputs[4:], low, bias=inputs[3])
        torch.testing.assert_close(run(*inputs), expected)


def test_a_new_function_with_the_same_code_and_numbers_is_not_traced_again(monkeypatch):
    traced = []
    once = user_losses.traced
    monkeypatch.setattr(user_losses, "traced", lambda *given: traced.append(given) or once(*given))
    for _ in range(3):
        for made in (closure, partial, default):
            loss(made(0.123))(*batch({}))
    assert len(traced) == 3


def mixing(statistics, *_):
    return statistics.logprob - statistics.logprob.mean()


def scalar(statistics, *_):
    return statistics.logprob.mean()


def in_place(statistics, old, *_):
    return old.mul_(statistics.logprob)


def random(statistics, *_):
    return torch.nn.functional.dropout(statistics.logprob)


def branching(statistics, *_):
    return statistics.logprob if statistics.logprob.sum() > 0 else -statistics.logprob


def reading(statistics, *_):
    return statistics.logprob * statistics.entropy.max().item()


def nothing(_statistics, *_):
    return None


def whole(statistics, *_):
    return statistics.correct.long()


CONSTANT = torch.ones(3)


def closing(statistics, *_):
    return statistics.logprob * CONSTANT.sum()


@pytest.mark.parametrize(
    ("token_loss", "message"),
    [
        (mixing, "depends on other tokens"),
        (scalar, r"it returned \[\]. Return one value for each token"),
        (in_place, "in.place"),
        (random, "random"),
        (branching, "must not branch on values"),
        (reading, r"\.item\(\)"),
        (nothing, "it returned NoneType"),
        (whole, "it returned torch.int64"),
        (closing, "Give that tensor as an input"),
    ],
)
@pytest.mark.parametrize("strategy", ["tokens", "vocab"])
def test_what_a_function_must_not_do(token_loss, message, strategy):
    inputs = batch({})
    with no_operators(), pytest.raises(ValueError, match=rf"^token_loss: expected a function .*{message}"):
        loss(token_loss, chunking=cases.CHUNKINGS[strategy])(*inputs)


def test_errors_name_the_argument():
    hidden, weight, labels, _, old, advantages = batch({})
    with pytest.raises(TypeError, match=r"^token_loss: expected a function .* got str"):
        linear_token_loss(hidden, weight, labels, "dpo", old)
    with pytest.raises(ValueError, match=r"^inputs\[1\]: expected \[23\] first, a value for each token, got \[22\]"):
        linear_token_loss(hidden, weight, labels, clipped, old, advantages[1:], 0.2, 0.3)
    with pytest.raises(TypeError, match=r"^inputs\[0\]: expected a number or a Tensor \[\.\.\., C\], got str"):
        linear_token_loss(hidden, weight, labels, clipped, "old")
    with pytest.raises(ValueError, match=r"^inputs\[2\]: expected a number without gradient"):
        linear_token_loss(hidden, weight, labels, clipped, old, advantages, torch.ones((), requires_grad=True), 0.3)


def test_tokens_strategy_says_what_it_takes_under_compile():
    inputs = batch({})
    run = torch.compile(loss(closure(0.1), chunking=cases.CHUNKINGS["tokens"]), fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="plain function without closure"):
        run(*inputs)


def test_half_precision_within_budget():
    """fp16, whose gradients at 1 / 65536 would be zero without a scale; against fp64."""
    hidden, weight, labels, _, old, advantages = batch({}, torch.float32)
    exact = reference.linear_token_loss(
        *[v.double() if v.is_floating_point() else v for v in (hidden, weight, labels)],
        clipped,
        old.double(),
        advantages.double(),
        0.2,
        0.3,
        reduction="sum",
        num_label_tokens=65536,
    )
    half = hidden.detach().half().requires_grad_()
    mine = linear_token_loss(
        half,
        weight.detach().half(),
        labels,
        clipped,
        old,
        advantages.detach(),
        0.2,
        0.3,
        reduction="sum",
        num_label_tokens=65536,
        chunking=cases.CHUNKINGS["tokens"],
    )
    truth = torch.autograd.grad(exact, hidden)[0]
    (found,) = torch.autograd.grad(mine * 65536, half)
    torch.testing.assert_close(found.float() / 65536, truth.float(), rtol=2e-2, atol=2e-2 * truth.abs().max().item())


def test_functorch_transforms_take_it():
    hidden, weight, labels, bias, old, advantages = batch({})
    fixed = functools.partial(loss(clipped), weight=weight, labels=labels, bias=bias, old=old, advantages=advantages)
    found = torch.func.grad(lambda h: fixed(hidden=h))(hidden.detach())
    expected = torch.autograd.grad(loss(clipped, reference)(hidden, weight, labels, bias, old, advantages), hidden)[0]
    torch.testing.assert_close(found, expected)


def test_a_function_that_is_traced_again_and_again_is_told_of():
    inputs = batch({})

    def anneal():
        for step in range(9):
            loss(closure(step / 100))(*inputs)

    with pytest.warns(
        UserWarning,
        match=r"closure.<locals>.<lambda> was another function in each of 8 calls, .*Give such numbers as inputs",
    ):
        anneal()


def choosing(first, second, third):
    """A closure over flags."""

    def chosen(statistics):
        loss = -statistics.logprob if first else statistics.logprob
        return loss + (statistics.entropy if second else 0) + (statistics.logsumexp if third else 0)

    return chosen


class Base(torch.nn.Module):
    def forward(self, statistics):
        return self.term(statistics)


class OfLogprob(Base):
    def term(self, statistics):
        return -statistics.logprob


class OfEntropy(Base):
    def term(self, statistics):
        return statistics.entropy


def attributed(statistics):
    return -statistics.logprob * attributed.factor


activation = torch.tanh


def activated(statistics):
    return activation(statistics.logprob)


@pytest.mark.parametrize("compiled", [False, True])
def test_functions_that_look_alike(compiled, monkeypatch):
    """Each is evaluated as it is now, whatever was seen before."""
    hidden, weight, labels, _, *_ = batch({})

    def call(token_loss, hidden):
        return linear_token_loss(hidden, weight, labels, token_loss)

    run = torch.compile(call, backend="eager", fullgraph=True) if compiled else call

    def check(token_loss):
        expected = reference.linear_token_loss(hidden, weight, labels, token_loss)
        torch.testing.assert_close(run(token_loss, hidden), expected)

    for flags in ((True, False, True), (True, False, False), (False, True, True)):
        check(choosing(*flags))
    for module in (OfLogprob(), OfEntropy()):
        check(module)
    if not compiled:  # Dynamo does not guard a function's attributes
        for attributed.factor in (1.0, 3.0):
            check(attributed)
    for function in (torch.tanh, torch.sigmoid):
        monkeypatch.setitem(globals(), "activation", function)
        check(activated)


def test_functions_made_in_compiled_code():
    hidden, weight, labels, _, *_ = batch({})

    def step(hidden, factor):
        def loss(statistics):
            return -statistics.logprob * factor

        inline = linear_token_loss(hidden, weight, labels, lambda statistics: statistics.entropy)
        return linear_token_loss(hidden, weight, labels, loss) + inline

    run = torch.compile(step, backend="eager", fullgraph=True)
    for factor in (2.0, 3.0, 4.0):
        torch.testing.assert_close(run(hidden, factor), step(hidden, factor))


def test_inputs_whose_width_changes():
    hidden, weight, labels, _, *_ = batch({})

    def summed(statistics, several):
        return statistics.logprob * several.sum(-1)

    run = torch.compile(lambda h, k: linear_token_loss(h, weight, labels, summed, k), backend="eager", fullgraph=True)
    for width in (2, 3, 5):
        several = torch.rand(TOKENS, width, dtype=torch.float64)
        torch.testing.assert_close(
            run(hidden, several), reference.linear_token_loss(hidden, weight, labels, summed, several)
        )


@pytest.mark.parametrize(
    "token_loss",
    [
        lambda s, a: s.logprob * a / a.amax().clamp(min=1),
        lambda s, a: torch.where((a < 0).any(), 0.0, 1.0) * s.logprob,
        lambda s, a: s.logprob * 2 if s.logprob.shape[0] > 4 else s.logprob,
        lambda s, a: s.logprob + torch.ones(5),
    ],
)
def test_dependence_on_other_tokens_at_any_scale(token_loss):
    hidden, weight, labels, _, *_ = batch({})
    with pytest.raises(ValueError, match=r"^token_loss: expected a function .*(depends on|could not be traced)"):
        linear_token_loss(hidden, weight, labels, token_loss, torch.arange(TOKENS, dtype=torch.float64))


def test_integers_that_not_every_example_fits():
    hidden, weight, labels, _, *_ = batch({})
    pieces = {"__builtins__": {}}
    exec("def bare(statistics): return -statistics.logprob", pieces)

    def divided(statistics, place, count):
        return statistics.logprob * (place % count)

    def chosen(statistics, values, index):
        return values.gather(1, index.unsqueeze(1)).squeeze(1) * statistics.logprob

    places, none = torch.arange(TOKENS), torch.zeros(TOKENS, dtype=torch.int64)
    values = torch.rand(TOKENS, 1, dtype=torch.float64)
    for token_loss, inputs in ((divided, (places, none + 4)), (chosen, (values, none)), (pieces["bare"], ())):
        torch.testing.assert_close(
            linear_token_loss(hidden, weight, labels, token_loss, *inputs),
            reference.linear_token_loss(hidden, weight, labels, token_loss, *inputs),
        )


@pytest.mark.parametrize("strategy", ["tokens", "vocab"])
def test_a_loss_that_is_nan_where_a_token_is_ignored(strategy):
    hidden, weight, labels, _, *_ = batch({})

    def ratio(statistics):
        return statistics.logprob / statistics.entropy

    weights = torch.rand(TOKENS, dtype=torch.float64, requires_grad=True)

    def of(lib, **more):
        return lambda h, w, t: lib.linear_token_loss(h, w, labels, ratio, token_weights=t, **more)

    import compiled_loss

    assert_matches(of(compiled_loss, chunking=cases.CHUNKINGS[strategy]), of(reference), (hidden, weight, weights))


def test_autocast_leaves_the_function_alone():
    """The head is cast, what the function multiplies is not, in either strategy."""
    hidden, weight, labels, _, *_ = batch({}, torch.float32)
    several = torch.randn(TOKENS, 64)

    def multiplied(statistics, several):
        return statistics.logprob * torch.bmm(several.unsqueeze(1), several.unsqueeze(2)).flatten()

    with torch.autocast("cpu", torch.bfloat16):
        found = [
            linear_token_loss(hidden, weight, labels, multiplied, several, chunking=cases.CHUNKINGS[strategy])
            for strategy in ("tokens", "vocab")
        ]
    torch.testing.assert_close(*found, rtol=1e-5, atol=0)
