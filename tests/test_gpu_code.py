"""Contracts 5 and 8 of the compiled GPU code, on any machine: generated for GPUs that are not there, and assembled.

Production shapes, bf16, inspected for sm_90. The bounds are sums of tensors and 5%; none is tuned. Expectations of
names are of torch 2.13: EXPECTTEST_ACCEPT=1 make test ARGS=tests/test_gpu_code.py refreshes them, on purpose.
"""

import re
from collections import Counter
from dataclasses import replace

import gpu_cases
import pytest
import torch
from expecttest import assert_expected_inline
from gpu_cases import SHAPES, keywords, linear

from compiled_loss.engine import hosts
from compiled_loss.engine.plan import MIN_ROWS
from compiled_loss.testing import (
    assert_assembles,
    assert_kernel_count,
    assert_peak_below,
    assert_saves_nothing_larger_than,
    assert_single_graph,
)

CONTRACTS, COUNTS = (pytest.mark.xdist_group(name) for name in ("GPU code", "GPU kernels"))  # inspections are shared
NVIDIA = ("cuda:sm_80", "cuda:sm_90", "cuda:sm_100")
REGIONS = pytest.mark.skipif(not hosts.REGIONS_WORK, reason="bodies are opaque operators on this torch")
NAMES = pytest.mark.skipif(not torch.__version__.startswith("2.13."), reason="kernel names are pinned on torch 2.13")
CASES = {("8B", name): case for name, case in gpu_cases.cases(SHAPES["8B"]).items()}
for _model in ("Gemma", "N < H"):
    for _strategy in ("tokens", "vocab"):
        for _name in ("plain", "everything"):
            _options = keywords(SHAPES[_model][0], SHAPES[_model][2])[_name]
            CASES[_model, f"{_strategy}, {_name}"] = linear(_strategy, SHAPES[_model], **_options)
for (_model, _name), _case in CASES.items():  # one GPU; a slow test assembles for all
    CASES[_model, _name] = replace(_case, options={**_case.options, "assemble": NVIDIA[1:2]})


# What CI inspects: a case for each kind of body and each way to walk. The slow tests inspect all.
CI = {
    *(("8B", f"{walk}, {kind}") for walk in ("tokens", "vocab", "logits") for kind in ("plain", "everything")),
    *(("8B", f"tokens, {kind}") for kind in ("bias", "softcap", "smoothing", "z-loss", "class weights", "mask")),
    *(("8B", name) for name in ("tokens, statistics", "vocab, none", "teacher, jsd", "logits, jsd", "logits, soft")),
    ("8B", "top, forward_kl"),
    ("N < H", "tokens, plain"),
}


def parameters(cases=CASES, ci=CI):
    return [pytest.param(*case, marks=() if case in ci else pytest.mark.slow, id="-".join(case)) for case in cases]


# Bytes a thread: of kernels that sum a call's losses, on torch 2.11.
SPILLS = {} if hosts.REGIONS_WORK else {"vocab, everything": 8, "logits, everything": 8}


def inspection(inspected, case, **options):
    return inspected(case.call, *case.inputs, **{"first_only": True, **case.options, **options})


def by_chunk(inspection, chunks):
    """How often each generated kernel runs that runs once a chunk or more, and how many others run: per direction."""
    generated = {k.name for k in inspection.kernels if k.source}
    counts = [{k: n for k, n in p.kernels.items() if k in generated} for p in inspection.passes]
    return [([n for n in c.values() if n >= chunks], sum(n for n in c.values() if n < chunks)) for c in counts]


@CONTRACTS
@pytest.mark.parametrize(("model", "name"), parameters())
def test_contract(inspected, model, name):
    case = CASES[model, name]
    tokens, width, vocab = SHAPES[model]
    found = inspection(inspected, case)

    assert_single_graph(found)
    assert not [x for p in found.passes for x in p.launches if x.kind in ("sync", "transfer", "collective")]
    assert_assembles(found, case.options["assemble"], spills=SPILLS.get(name, 0))

    assert_peak_below(found, 1.05 * (case.outputs + case.chunk) + 64 * tokens + 16 * vocab)
    assert found.forward.peak_bytes <= 1.05 * (case.keeps + case.chunk) + 64 * tokens + 16 * vocab
    assert found.saved_bytes <= case.keeps + 64 * tokens
    assert_saves_nothing_larger_than(found, max(2 * vocab * width if case.keeps else 0, 8 * tokens))

    unit = 2 * tokens * width * vocab
    operations = [p.operations / unit for p in found.passes]
    assert operations == pytest.approx([case.forward, case.backward][: len(operations)], rel=0.01, abs=0.01)

    if hosts.REGIONS_WORK and case.chunk:
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
def test_chunks_of_their_own_size_of_an_odd_vocabulary(inspected, name, part):
    """Dynamo inlines what is called once, and Inductor pads rows of 50257: either was a second chunk."""
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
def test_half_of_the_memory_of_the_unchunked_loss_or_less(inspected, model):
    """What it is all for; and the unchunked loss shows that the peak is not always low."""
    tokens, width, vocab = SHAPES[model]
    case = CASES[model, "tokens, plain"]
    unchunked = inspected(gpu_cases.unchunked, *case.inputs, assemble=False)
    assert unchunked.saved_bytes >= 2 * tokens * vocab
    held = 2 * (tokens + vocab) * width
    assert inspection(inspected, case).peak_bytes - held < (unchunked.peak_bytes - held) / 2


@CONTRACTS
def test_the_naive_loop_fails_these_tests(inspected):
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
@REGIONS
def test_a_chunk_of_all_tokens_forms_its_gradients_in_forward(inspected):
    """With N < H, keeping the logits for backward's GEMMs takes fewer bytes: the partitioner would."""
    for wanted in ("hw", "w"):
        found = inspection(inspected, linear("tokens", (512, 4096, 131072), 1, grad=wanted), assemble=False)
        assert not found.passes[1].gemms


# --- the same code for any number of chunks ---------------------------------------------------------------------------


def counts(inspected, strategy, name):
    """A line a kernel: how often it runs, as a + b times the chunks C, and its name without Inductor's number."""
    shape = (32 * MIN_ROWS, 4096, 131072) if strategy == "tokens" else (2048, 1024, 1 << 19)
    options = keywords(shape[0], shape[2])[name]
    runs = {n: inspection(inspected, linear(strategy, shape, n, **options), assemble=False) for n in (2, 8, 32)}
    lines = []
    for i, direction in enumerate(("forward", "backward")):
        tables = {n: Counter() for n in runs}
        for n, run in runs.items():
            for kernel, count in run.passes[i].kernels.items():
                # What has no code, but now and then its name in that of a kernel.
                stem = re.sub("_fence_(?=_)|_split_with_sizes_copy|_[0-9]+$", "", kernel)
                tables[n][stem] += count
        assert tables[2].keys() == tables[8].keys() == tables[32].keys()
        for kernel in tables[8]:
            two, eight, many = (tables[n][kernel] for n in (2, 8, 32))
            each, rest = divmod(eight - two, 6)
            assert rest == 0
            assert many - eight == 24 * each
            lines.append(f"{direction} {two - 2 * each:+d} {each:+d}C {kernel}")
    return "\n".join(lines)


@COUNTS
@REGIONS
@NAMES
def test_kernels_of_the_token_walk(inspected):
    assert_expected_inline(
        counts(inspected, "tokens", "plain"),
        """\
forward +1 +0C triton_red_fused__to_copy_mul_ne_ones_like_sum
forward +2 +0C triton_per_fused__to_copy_mul_ne_ones_like_sum
forward +1 +0C triton_poi_fused__to_copy_bitwise_and_bitwise_or_clamp_eq_ge_lt_mul_ne_ones_like_reciprocal_scalar_tensor_where
forward +1 +2C mm
forward +0 +1C triton_red_fused__to_copy_amax_arange_as_strided_bitwise_and_bitwise_or_clamp_div_eq_exp_ge_gt_isnan_log_lt_mul_ne_ones_like_reciprocal_scalar_tensor_slice_sub_sum_unsqueeze_where
forward +0 +1C gt
forward +0 +1C new_zeros
forward +0 +1C where
forward -1 +1C addmm
forward +1 +0C cat
forward +1 +0C triton_red_fused_ne_scalar_tensor_sum_where
backward +2 +0C triton_poi_fused__to_copy_expand_mul""",
    )


@pytest.mark.slow
@COUNTS
@REGIONS
@NAMES
def test_kernels_of_the_token_walk_with_everything(inspected):
    assert_expected_inline(
        counts(inspected, "tokens", "everything"),
        """\
forward +1 +0C triton_red_fused_sum
forward +1 +0C triton_per_fused_sum
forward +1 +0C triton_red_fused__to_copy_bitwise_and_clamp_index_mul_ne_ones_scalar_tensor_sum_where
forward +3 +0C triton_per_fused__to_copy_bitwise_and_clamp_index_mul_ne_ones_scalar_tensor_sum_where
forward +1 +0C triton_poi_fused__to_copy_bitwise_and_bitwise_or_clamp_eq_ge_index_lt_mul_ne_neg_ones_reciprocal_scalar_tensor_where
forward +1 +0C triton_poi_fused__to_copy_stack
forward +1 +0C triton_poi_fused_div_mul_ones_stack
forward +1 +2C mm
forward +0 +1C triton_red_fused__to_copy_add_amax_arange_as_strided_bitwise_and_bitwise_or_clamp_div_eq_exp_ge_isnan_log_lt_mul_ne_neg_ones_pow_reciprocal_rsub_scalar_tensor_slice_stack_sub_sum_tanh_unbind_unsqueeze_where
forward +0 +1C sum
forward -1 +1C addmm
forward -1 +1C add_
forward +1 +0C cat
forward +1 +0C triton_red_fused_bitwise_and_ne_scalar_tensor_sum_where
backward +3 +0C triton_poi_fused__to_copy_expand_mul""",
    )


@pytest.mark.slow
@COUNTS
@REGIONS
@NAMES
def test_kernels_of_the_vocabulary_walk(inspected):
    assert_expected_inline(
        counts(inspected, "vocab", "plain"),
        """\
forward +1 +0C triton_poi_fused_arange_mul
forward +2 +0C triton_poi_fused_full
forward +0 +1C mm
forward +0 +1C triton_red_fused__to_copy_add_amax_arange_as_strided_eq_exp_full_maximum_mul_scalar_tensor_slice_sub_sum_unsqueeze_where
forward +1 +0C triton_poi_fused_log_sub
forward +1 +0C triton_red_fused_bitwise_and_bitwise_or_eq_ge_lt_mul_ne_ones_reciprocal_scalar_tensor_sum_where
backward +1 +0C triton_poi_fused_as_strided_clone
backward +1 +0C triton_poi_fused_add_div_expand_mul_ones_scalar_tensor_where_zeros
backward +1 +2C mm
backward +0 +1C triton_poi_fused__to_copy_add_arange_as_strided_eq_exp_expand_mul_ones_scalar_tensor_slice_sub_unsqueeze_where
backward -1 +1C addmm""",
    )


@pytest.mark.slow
@COUNTS
@REGIONS
@NAMES
def test_kernels_of_the_vocabulary_walk_with_everything(inspected):
    assert_expected_inline(
        counts(inspected, "vocab", "everything"),
        """\
forward +1 +0C triton_red_fused_sum
forward +1 +0C triton_per_fused_sum
forward +1 +0C triton_poi_fused_div_ones
forward +2 +0C triton_poi_fused_full
forward +1 +0C triton_poi_fused_arange_mul
forward +1 +0C triton_poi_fused_mul_ones
forward +0 +1C mm
forward +0 +1C triton_red_fused__to_copy_add_amax_arange_as_strided_div_eq_exp_full_maximum_mul_ones_reciprocal_scalar_tensor_slice_sub_sum_tanh_unsqueeze_where
forward +1 +0C triton_poi_fused_add_log_sub
forward +1 +0C triton_red_fused__to_copy_add_bitwise_and_bitwise_or_clamp_eq_ge_index_lt_mul_ne_neg_ones_pow_reciprocal_scalar_tensor_sum_where
backward +1 +0C triton_poi_fused__to_copy_add_div_expand_mul_neg_ones_scalar_tensor_where
backward +1 +0C triton_poi_fused_as_strided_clone
backward +1 +2C mm
backward +0 +1C triton_poi_fused__to_copy_add_arange_as_strided_div_eq_exp_expand_mul_reciprocal_rsub_scalar_tensor_slice_sub_tanh_unsqueeze_where
backward +0 +1C sum
backward -1 +1C addmm
backward +1 +0C triton_poi_fused__to_copy""",
    )


@pytest.mark.slow
@CONTRACTS
@REGIONS
@NAMES
def test_kernels_on_logits(inspected):
    found = {name: inspection(inspected, CASES["8B", name]) for _, name in CASES if name.startswith("logits")}
    assert_expected_inline(
        "\n".join(
            f"{name}: {direction} {count} {kernel}"
            for name, one in found.items()
            for direction, p in zip(("forward", "backward"), one.passes, strict=False)
            for kernel, count in p.kernels.items()
        ),
        """\
logits, plain: forward 1 triton_red_fused__to_copy_amax_arange_bitwise_and_bitwise_or_eq_exp_full_ge_lt_maximum_ne_scalar_tensor_sub_sum_unsqueeze_where_0
logits, plain: forward 1 triton_red_fused_add_eq_exp_full_log_mul_ones_reciprocal_scalar_tensor_sub_sum_where_1
logits, plain: backward 1 triton_poi_fused__to_copy_add_arange_div_eq_exp_expand_mul_ones_scalar_tensor_sub_unsqueeze_where_zeros_0
logits, none: forward 1 triton_red_fused__to_copy_add_amax_arange_bitwise_and_bitwise_or_eq_exp_full_ge_log_lt_maximum_mul_ne_ones_scalar_tensor_sub_sum_unsqueeze_where_0
logits, none: backward 1 triton_poi_fused__to_copy_add_arange_div_eq_exp_mul_ones_scalar_tensor_sub_unsqueeze_where_zeros_0
logits, everything: forward 1 triton_red_fused__to_copy_bitwise_and_clamp_eq_index_mul_ne_ones_reciprocal_scalar_tensor_sum_where_0
logits, everything: forward 1 triton_red_fused_sum_1
logits, everything: forward 1 triton_per_fused_sum_2
logits, everything: forward 1 triton_red_fused__to_copy_add_amax_arange_bitwise_and_bitwise_or_clamp_div_eq_exp_full_ge_index_log_lt_maximum_mul_neg_ones_pow_reciprocal_scalar_tensor_sub_sum_tanh_unsqueeze_where_3
logits, everything: forward 1 triton_red_fused_sum_4
logits, everything: backward 1 triton_poi_fused__to_copy_add_expand_log_mul_ones_pow_scalar_tensor_where_0
logits, everything: backward 1 triton_poi_fused__to_copy_add_arange_div_eq_exp_expand_mul_neg_ones_reciprocal_rsub_scalar_tensor_sub_tanh_unsqueeze_where_1
logits, loss only: forward 1 triton_red_fused_mul_ne_ones_ones_like_scalar_tensor_sum_where_0
logits, loss only: forward 1 triton_red_fused__to_copy_add_amax_arange_bitwise_and_bitwise_or_eq_exp_full_ge_log_lt_maximum_mul_ne_ones_ones_like_reciprocal_scalar_tensor_sub_sum_unsqueeze_where_1
logits, loss only: forward 1 triton_red_fused_sum_2
logits, soft: forward 1 triton_red_fused__to_copy_amax_eq_exp_log_mul_neg_scalar_tensor_sub_sum_unsqueeze_where_0
logits, soft: forward 1 triton_red_fused__to_copy_eq_mul_ne_reciprocal_scalar_tensor_sum_where_1
logits, soft: backward 1 triton_poi_fused__to_copy_expand_in_turn_mul_ne_scalar_tensor_where_0
logits, soft: backward 1 clone
logits, soft: backward 1 triton_red_fused__to_copy_exp_expand_isnan_mul_ne_neg_scalar_tensor_sub_sum_unsqueeze_where_1
logits, forward_kl: forward 1 triton_red_fused__to_copy_amax_eq_exp_log_mul_scalar_tensor_sub_sum_unsqueeze_where_0
logits, forward_kl: forward 1 triton_red_fused_eq_mul_ne_ones_reciprocal_scalar_tensor_sum_where_1
logits, forward_kl: backward 1 triton_poi_fused_expand_in_turn_mul_ones_scalar_tensor_where_0
logits, forward_kl: backward 2 clone
logits, forward_kl: backward 1 triton_red_fused__to_copy_exp_expand_isnan_mul_neg_ones_scalar_tensor_sub_sum_unsqueeze_where_1
logits, reverse_kl: forward 1 triton_red_fused__to_copy_amax_eq_exp_log_mul_scalar_tensor_sub_sum_unsqueeze_where_0
logits, reverse_kl: forward 1 triton_red_fused_eq_mul_ne_ones_reciprocal_scalar_tensor_sum_where_1
logits, reverse_kl: backward 1 triton_poi_fused_expand_in_turn_mul_ones_scalar_tensor_where_0
logits, reverse_kl: backward 2 clone
logits, reverse_kl: backward 1 triton_poi_fused__to_copy_eq_exp_expand_isnan_mul_ones_scalar_tensor_sub_unsqueeze_where_1
logits, jsd: forward 1 triton_red_fused__to_copy_amax_clamp_eq_exp_expm1_log_log1p_mul_neg_ones_rsub_scalar_tensor_sub_sum_unsqueeze_where_0
logits, jsd: forward 1 triton_red_fused_add_eq_mul_ne_ones_reciprocal_scalar_tensor_sum_where_1
logits, jsd: backward 1 triton_poi_fused_expand_in_turn_mul_ones_scalar_tensor_where_0
logits, jsd: backward 2 clone
logits, jsd: backward 1 triton_poi_fused__to_copy_clamp_eq_exp_expand_expm1_isnan_log1p_mul_neg_ones_rsub_scalar_tensor_sub_unsqueeze_where_1
logits, everything in two: forward 1 triton_red_fused__to_copy_amax_arange_bitwise_and_bitwise_or_clamp_div_eq_exp_expm1_ge_log_log1p_lt_mul_ne_neg_ones_rsub_scalar_tensor_sub_sum_unsqueeze_where_0
logits, everything in two: forward 1 triton_red_fused_add_eq_log_mul_ones_reciprocal_scalar_tensor_sub_sum_where_1
logits, everything in two: backward 1 triton_poi_fused_expand_mul_ones_scalar_tensor_where_0
logits, everything in two: backward 2 clone
logits, everything in two: backward 1 triton_poi_fused__to_copy_add_arange_clamp_div_eq_exp_expand_expm1_isnan_log1p_mul_neg_ones_rsub_scalar_tensor_sub_unsqueeze_where_1""",
    )


@pytest.mark.slow
@CONTRACTS
@REGIONS
@NAMES
def test_number_of_kernels(inspected):
    """Launches and distinct kernels of every case, GEMMs and copies of the library included."""
    found = {name: inspection(inspected, case) for (model, name), case in CASES.items() if model == "8B"}
    assert_expected_inline(
        "\n".join(
            f"{name}: " + ", ".join(f"{len(p.launches)} launches of {len(p.kernels)}" for p in one.passes)
            for name, one in found.items()
        ),
        """\
tokens, plain: 19 launches of 6, 2 launches of 2
tokens, bias: 26 launches of 8, 3 launches of 3
tokens, softcap: 20 launches of 7, 2 launches of 2
tokens, smoothing: 19 launches of 6, 2 launches of 2
tokens, z-loss: 19 launches of 6, 2 launches of 2
tokens, class weights: 21 launches of 8, 2 launches of 2
tokens, mask: 19 launches of 6, 2 launches of 2
tokens, everything: 30 launches of 12, 3 launches of 3
tokens, loss only: 15 launches of 6
tokens, frozen hidden: 15 launches of 6, 1 launches of 1
tokens, frozen weight: 15 launches of 5, 1 launches of 1
tokens, with statistics: 23 launches of 6, 2 launches of 2
vocab, plain: 13 launches of 7, 18 launches of 5
vocab, bias: 13 launches of 7, 23 launches of 7
vocab, softcap: 14 launches of 8, 18 launches of 5
vocab, smoothing: 13 launches of 7, 18 launches of 5
vocab, z-loss: 13 launches of 7, 18 launches of 5
vocab, class weights: 15 launches of 9, 18 launches of 5
vocab, mask: 13 launches of 7, 18 launches of 5
vocab, everything: 17 launches of 11, 23 launches of 7
vocab, loss only: 14 launches of 7
vocab, frozen hidden: 13 launches of 7, 14 launches of 4
vocab, frozen weight: 13 launches of 7, 14 launches of 5
vocab, with statistics: 13 launches of 7, 18 launches of 5
tokens, statistics: 17 launches of 6
vocab, statistics: 13 launches of 7, 18 launches of 5
vocab, none: 13 launches of 7, 18 launches of 5
logits, plain: 2 launches of 2, 1 launches of 1
logits, none: 1 launches of 1, 1 launches of 1
logits, everything: 5 launches of 5, 2 launches of 2
logits, loss only: 3 launches of 3
teacher, soft: 27 launches of 7, 2 launches of 2
logits, soft: 2 launches of 2, 3 launches of 3
teacher, forward_kl: 27 launches of 7, 2 launches of 2
logits, forward_kl: 2 launches of 2, 4 launches of 3
teacher, reverse_kl: 27 launches of 7, 2 launches of 2
logits, reverse_kl: 2 launches of 2, 4 launches of 3
teacher, jsd: 28 launches of 8, 2 launches of 2
logits, jsd: 2 launches of 2, 4 launches of 3
teacher, none: 19 launches of 4, 21 launches of 4
top, forward_kl: 56 launches of 16, 2 launches of 2
top, everything: 58 launches of 17, 2 launches of 2
teacher, everything: 29 launches of 8, 2 launches of 2
logits, everything in two: 2 launches of 2, 4 launches of 3""",
    )


@pytest.mark.slow
@CONTRACTS
@REGIONS
def test_few_rows_split_the_reductions(inspected):
    """Why the planner takes MIN_ROWS at least: with half as many a body is several kernels."""
    shape = (4 * MIN_ROWS, 4096, 131072)
    enough = inspection(inspected, linear("tokens", shape, 4), assemble=False)
    few = inspection(inspected, linear("tokens", shape, 8), assemble=False)
    assert by_chunk(enough, 4)[0][0] == [4]
    assert by_chunk(few, 8)[0][0] == [8] * 5


# --- other GPUs ----------------------------------------------------------------------------------------------------------------


AMD = [case for case in CASES if case[0] == "8B"]


@pytest.mark.slow
@CONTRACTS
@pytest.mark.parametrize(("model", "name"), CASES, ids=lambda v: v)
def test_every_nvidia_gpu(inspected, model, name):
    found = inspection(inspected, CASES[model, name], assemble=NVIDIA)
    assert_assembles(found, NVIDIA, spills=SPILLS.get(name, 0))


@COUNTS
@pytest.mark.parametrize(("model", "name"), parameters(AMD, [("8B", "logits, everything")]))
def test_amd(inspected, model, name):
    """From sources of its own, for wavefronts of 64."""
    case = CASES[model, name]
    found = inspection(inspected, case, device="hip:gfx942", assemble=("hip:gfx942",))
    assert_assembles(found, ["hip:gfx942"])
    assert_peak_below(found, 1.05 * (case.outputs + case.chunk) + 64 * SHAPES[model][0] + 16 * SHAPES[model][2])
    assert any("'warp_size': 64" in k.source or "warp_size=64" in k.source for k in found.kernels)


@CONTRACTS
def test_kernel_count_names_the_kernels(inspected):
    found = inspection(inspected, CASES["8B", "logits, plain"])
    with pytest.raises(AssertionError, match="triton_"):
        assert_kernel_count(found, 100)
