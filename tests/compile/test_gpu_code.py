"""Contracts 5 and 8 of the compiled GPU code, on any machine: generated for GPUs that are not there, and assembled.

Production shapes, bf16, inspected for sm_90. The bounds are sums of tensors and 5%; none is tuned. Expectations of
names are of torch 2.13: EXPECTTEST_ACCEPT=1 make test ARGS=tests/compile/test_gpu_code.py refreshes them, on purpose.
"""

import functools
import re
from collections import Counter
from dataclasses import replace

import gpu_cases
import pytest
import torch
from gpu_cases import SHAPES, keywords, linear

from compiled_loss import Chunking, linear_cross_entropy
from compiled_loss.planner.plan import MIN_ROWS
from compiled_loss.testing import (
    assert_assembles,
    assert_kernel_count,
    assert_peak_below,
    assert_saves_nothing_larger_than,
    assert_single_graph,
)

CONTRACTS, COUNTS = (pytest.mark.xdist_group(name) for name in ("GPU code", "GPU kernels"))  # inspections are shared
NVIDIA = ("cuda:sm_80", "cuda:sm_90", "cuda:sm_100")
NAMES = pytest.mark.skipif(not torch.__version__.startswith("2.13."), reason="kernel names are pinned on torch 2.13")
CASES = {("8B", name): case for name, case in gpu_cases.cases(SHAPES["8B"]).items()}
for _model in ("Gemma", "N < H"):
    for _strategy in ("tokens", "vocab"):
        for _name in ("plain", "everything"):
            _options = keywords(SHAPES[_model][0], SHAPES[_model][2])[_name]
            CASES[_model, f"{_strategy}, {_name}"] = linear(_strategy, SHAPES[_model], **_options)
for (_model, _name), _case in CASES.items():  # one GPU; a slow test assembles for all
    CASES[_model, _name] = replace(_case, options={**_case.options, "assemble": NVIDIA[1:2]})


# What CI inspects: a case for each kind of body, each strategy, and given logits. The slow tests inspect all.
CI = {
    *(("8B", f"{form}, {kind}") for form in ("tokens", "vocab", "logits") for kind in ("plain", "everything")),
    *(("8B", f"tokens, {kind}") for kind in ("bias", "softcap", "smoothing", "z-loss", "class weights", "mask")),
    *(
        ("8B", name)
        for name in (
            "tokens, statistics",
            "tokens, policy",
            "tokens, user's everything",
            "vocab, none",
            "teacher, jsd",
            "teacher, mixture",
            "teacher, acceptance with statistics",
            "logits, jsd",
            "logits, mixture",
            "logits, soft",
        )
    ),
    ("8B", "top, forward_kl"),
    ("N < H", "tokens, plain"),
}


def parameters(cases=CASES, ci=CI):
    return [pytest.param(*case, marks=() if case in ci else pytest.mark.slow, id="-".join(case)) for case in cases]


def inspection(inspected, case, **options):
    return inspected(case.call, *case.inputs, **{"first_only": True, **case.options, **options})


def by_chunk(inspection, chunks):
    """How often each generated kernel runs that runs once a chunk or more, and how many others run: per direction."""
    generated = {k.name for k in inspection.kernels if k.source}
    counts = [{k: n for k, n in p.kernels.items() if k in generated} for p in inspection.passes]
    return [([n for n in c.values() if n >= chunks], sum(n for n in c.values() if n < chunks)) for c in counts]


# Defects to repair, in bytes: of a chunk, since heads have options, and of a kernel of [N] numbers, once a call.
SPILLS = {("8B", "teacher, jsd"): 16, ("8B", "vocab, class weights"): 8}


@CONTRACTS
@pytest.mark.parametrize(("model", "name"), parameters())
def test_memory_graphs_and_operations(inspected, model, name):
    case = CASES[model, name]
    tokens, width, vocab = SHAPES[model]
    found = inspection(inspected, case)

    assert_single_graph(found)
    assert not [x for p in found.passes for x in p.launches if x.kind in ("sync", "transfer", "collective")]
    spills = SPILLS.get((model, name)) if torch.__version__.startswith("2.13.") else None
    if spills is not None:
        with pytest.raises(AssertionError, match=f"spills {spills} bytes a thread"):
            assert_assembles(found, case.options["assemble"])
    else:
        assert_assembles(found, case.options["assemble"])

    assert_peak_below(found, 1.05 * (case.outputs + case.chunk) + 64 * tokens + 16 * vocab)
    assert found.forward.peak_bytes <= 1.05 * (case.keeps + case.chunk) + 64 * tokens + 16 * vocab
    assert found.saved_bytes <= case.keeps + 64 * tokens
    assert_saves_nothing_larger_than(found, max(2 * vocab * width if case.keeps else 0, 8 * tokens))

    unit = 2 * tokens * width * vocab
    operations = [p.operations / unit for p in found.passes]
    assert operations == pytest.approx([case.forward, case.backward][: len(operations)], rel=0.01, abs=0.01)

    if case.chunk:
        for (inside, outside), each in zip(by_chunk(found, case.chunks), case.generated, strict=False):
            assert inside == [case.chunks] * each
            assert outside <= 12


@CONTRACTS
@pytest.mark.parametrize("part", [1.0, 0.6], ids=["one chunk", "two, the last ragged"])
@pytest.mark.parametrize(
    "name",
    [
        *("tokens, plain", "vocab, plain"),
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("tokens, everything", "vocab, everything", "none")),
    ],
)
def test_odd_vocabulary_and_ragged_chunks(inspected, name, part):
    """Rows of 50257, which Inductor pads in graphs of its own."""
    tokens, _, vocab = shape = 1024, 512, 50257
    strategy, _, more = name.partition(", ")
    size = int((vocab if strategy == "vocab" else tokens) * part)
    if strategy == "none":
        case = replace(gpu_cases.two_heads(gpu_cases.with_teacher, shape, size=size, reduction="none"), keeps=0)
    else:
        case = linear(strategy, shape, size=size, **keywords(tokens, vocab)[more])
    found = inspection(inspected, case, assemble=False)
    assert_peak_below(found, 1.05 * (case.outputs + case.chunk) + 64 * tokens + 16 * vocab)
    assert found.saved_bytes <= case.keeps + 64 * tokens


@CONTRACTS
@pytest.mark.parametrize(("model", "name"), parameters([case for case in CASES if case[1].startswith("logits")]))
def test_one_pass_over_logits_each_way(inspected, model, name):
    tokens, _, vocab = SHAPES[model]
    found = inspection(inspected, CASES[model, name])
    for p in found.passes:
        assert sum(x.read_bytes >= 2 * tokens * vocab for x in p.launches) == 1
    assert sum(x.written_bytes >= 2 * tokens * vocab for x in found.forward.launches) == 0


@CONTRACTS
@pytest.mark.parametrize("model", ["8B", "N < H", pytest.param("Gemma", marks=pytest.mark.slow)])
def test_half_of_the_memory_of_the_unchunked_loss(inspected, model):
    """What it is all for; and the unchunked loss shows that the peak is not always low."""
    tokens, width, vocab = SHAPES[model]
    case = CASES[model, "tokens, plain"]
    unchunked = inspected(gpu_cases.unchunked, *case.inputs, assemble=False)
    assert unchunked.saved_bytes >= 2 * tokens * vocab
    held = 2 * (tokens + vocab) * width
    assert inspection(inspected, case).peak_bytes - held < (unchunked.peak_bytes - held) / 2


@CONTRACTS
def test_naive_loop_fails(inspected):
    """A test of the tests: one graph, no break, and all logits kept."""
    tokens, _, vocab = shape = (2048, 1024, 32768)
    case = linear("vocab", shape)
    found = inspected(gpu_cases.naive_loop, *case.inputs, assemble=False)
    assert_single_graph(found)
    with pytest.raises(AssertionError, match="peak of"):
        assert_peak_below(found, 1.05 * (case.outputs + case.chunk) + 64 * tokens + 16 * vocab)
    with pytest.raises(AssertionError, match="saves for backward"):
        assert_saves_nothing_larger_than(found, 8 * tokens)


@CONTRACTS
def test_single_chunk_forms_its_gradients_in_forward(inspected):
    """With N < H, keeping the logits for backward's GEMMs takes fewer bytes: the partitioner would."""
    for wanted in ("hw", "w"):
        found = inspection(inspected, linear("tokens", (512, 4096, 131072), 1, grad=wanted), assemble=False)
        assert not found.passes[1].gemms


# The same code for any number of chunks -----------------------------------------------------------------------------


def by_kind(inspected, strategy, name):
    """{direction: {"each" chunk, or the "rest" of a call: how many kernels it launches of what is generated, GEMMs and
    a library's other ones}}, the same for 2, 8 and 32 chunks; and a chunk's generated kernels."""
    shape = (32 * MIN_ROWS, 4096, 131072) if strategy == "tokens" else (2048, 1024, 1 << 19)
    options = keywords(shape[0], shape[2])[name]
    runs = {n: inspection(inspected, linear(strategy, shape, n, **options), assemble=False) for n in (2, 8, 32)}
    found, bodies = {}, []
    for i, direction in enumerate(("forward", "backward")):
        tables = {n: Counter(map(kind_of, run.passes[i].launches)) for n, run in runs.items()}
        names = {n: set(run.passes[i].kernels) for n, run in runs.items()}
        assert names[2] == names[8] == names[32]
        each, rest = {}, {}
        for kind in tables[8]:
            two, eight, many = (tables[n][kind] for n in (2, 8, 32))
            each[kind], odd = divmod(eight - two, 6)
            assert odd == 0
            assert many - eight == 24 * each[kind]
            rest[kind] = two - 2 * each[kind]
        found[direction] = [{k: n for k, n in counts.items() if n} for counts in (each, rest)]
        bodies += [k for k, n in runs[32].passes[i].kernels.items() if k.startswith("triton") and n >= 32]
    return found, bodies


def kind_of(launch):
    if launch.kind == "gemm":
        return "GEMM"
    return "generated" if launch.kernel.startswith("triton_") else "library"


@COUNTS
@pytest.mark.parametrize("name", ["plain", pytest.param("everything", marks=pytest.mark.slow)])
def test_kernel_counts_per_chunk_of_tokens(inspected, name):
    """Its logits, one body, the copy of the hidden states that count, dH and dW; with a bias also its sum.

    A call has the rows that count, a zero, and the sums of losses and rows in three kernels.
    """
    found, bodies = by_kind(inspected, "tokens", name)
    forward, backward = found["forward"], found["backward"]
    assert forward[0] == {"GEMM": 3, "generated": 1, "library": 1 if name == "plain" else 3}
    assert forward[1].get("GEMM", 0) == 0
    if name == "plain":
        assert sum(forward[1].values()) <= 5  # of [N] or of one number
    assert backward == [{}, {"generated": 2 if name == "plain" else 3}]
    assert len(bodies) == 1


@COUNTS
@pytest.mark.slow
@pytest.mark.xfail(raises=AssertionError, strict=True, reason="13: scales, coefficients, sums of weights, one head")
def test_few_launches_of_a_call_with_every_option(inspected):
    found, _ = by_kind(inspected, "tokens", "everything")
    assert sum(found["forward"][1].values()) <= 8


@COUNTS
@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "everything"])
def test_kernel_counts_per_chunk_of_vocab(inspected, name):
    found, bodies = by_kind(inspected, "vocab", name)
    forward, backward = found["forward"], found["backward"]
    assert forward[0] == {"GEMM": 1, "generated": 1}
    assert backward[0] == {"GEMM": 3, "generated": 1, "library": 1 if name == "plain" else 2}
    assert sum(forward[1].values()) <= 24
    assert sum(backward[1].values()) <= 6
    assert len(bodies) == 2


@COUNTS
@NAMES
def test_kernel_name_of_a_chunk_of_tokens(inspected):
    """One kernel reads the logits three times and writes their gradient over them: maximum, sum, gradient."""
    _, (body,) = by_kind(inspected, "tokens", "plain")
    assert body.startswith("triton_red_fused_")
    assert {"amax", "exp", "sum", "log1p", "where"} <= set(body.split("_"))


@COUNTS
@NAMES
@pytest.mark.parametrize("name", ["plain", "softcap"])
def test_the_first_loop_of_a_chunk_of_tokens_finds_the_maximum_alone(inspected, name):
    """What else is in it keeps it from being unrolled: 17 instructions a logit for 5, with a softcap a tanh more."""
    found = inspection(inspected, CASES["8B", f"tokens, {name}"], assemble=False)
    (kernel,) = [k for k in found.kernels if "_amax_" in k.name]
    _, first, *others = re.split(r"\n    for \S+ in tl\.range", kernel.source)
    assert len(others) == 2
    loop = first.partition("\n    tmp")[0]
    assert "maximum(" in loop and "==" not in loop and "tanh" not in loop


def two_chunk_sizes(hidden, weight, labels):
    """In chunks of 2**27 and of 2**32 logits."""
    few = linear_cross_entropy(hidden[:1024], weight, labels[:1024], chunking=Chunking(chunk_size=1024))
    return few + linear_cross_entropy(hidden, weight, labels, chunking=Chunking(chunk_size=32768))


@CONTRACTS
def test_64_bit_indexing_of_many_logits(inspected):
    inputs = ("bf16[32768,64]:grad", "bf16[131072,64]:grad", "int64[32768]:0..9")
    found = inspected(two_chunk_sizes, *inputs, assemble=False)
    bodies = [k.source for k in found.kernels if "amax" in k.name]
    assert sorted("'xnumel': 'i64'" in source for source in bodies) == [False, True]


@CONTRACTS
@pytest.mark.parametrize("dtype", ["bf16", "f16"])
@pytest.mark.parametrize("strategy", ["tokens", "vocab"])
def test_few_logits(inspected, strategy, dtype):
    """Where nothing is added in another dtype, the call is a part of the caller's graph; fp16 needs an operator."""
    inputs = (f"{dtype}[64,64]:grad", f"{dtype}[256,64]:grad", "int64[64]:0..255")
    loss = functools.partial(linear_cross_entropy, chunking=Chunking(strategy=strategy))
    found = inspected(loss, *inputs, assemble=False)
    assert_single_graph(found)
    in_operators = [x for p in found.passes for x in p.launches if kind_of(x) == "library"]
    assert bool(in_operators) == (dtype == "f16")


@pytest.mark.slow
@CONTRACTS
def test_fewer_rows_than_min_rows_split_the_kernel(inspected):
    """Why the planner takes MIN_ROWS at least: with half as many a body is several kernels."""
    shape = (4 * MIN_ROWS, 4096, 131072)
    enough = inspection(inspected, linear("tokens", shape, 4), assemble=False)
    few = inspection(inspected, linear("tokens", shape, 8), assemble=False)
    assert by_chunk(enough, 4)[0][0] == [4]
    assert by_chunk(few, 8)[0][0] == [8] * 5


# Other GPUs ---------------------------------------------------------------------------------------------------------


AMD = [case for case in CASES if case[0] == "8B"]


@pytest.mark.slow
@CONTRACTS
@pytest.mark.parametrize(("model", "name"), CASES, ids=lambda v: v)
def test_assembles_for_every_nvidia_gpu(inspected, model, name):
    found = inspection(inspected, CASES[model, name], assemble=NVIDIA)
    assert_assembles(found, NVIDIA)


@COUNTS
@pytest.mark.parametrize(("model", "name"), parameters(AMD, [("8B", "logits, everything")]))
def test_assembles_for_amd(inspected, model, name):
    """From sources of its own, for wavefronts of 64."""
    case = CASES[model, name]
    found = inspection(inspected, case, device="hip:gfx942", assemble=("hip:gfx942",))
    assert_assembles(found, ["hip:gfx942"])
    assert_peak_below(found, 1.05 * (case.outputs + case.chunk) + 64 * SHAPES[model][0] + 16 * SHAPES[model][2])
    assert any("'warp_size': 64" in k.source or "warp_size=64" in k.source for k in found.kernels)


@CONTRACTS
def test_assert_kernel_count_names_the_kernels(inspected):
    found = inspection(inspected, CASES["8B", "logits, plain"])
    with pytest.raises(AssertionError, match="triton_"):
        assert_kernel_count(found, 100)
