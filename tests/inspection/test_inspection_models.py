"""Training steps of whole models, each in one of the ways in which people train them."""

import functools
import sys
from importlib.util import find_spec

import inspected_functions as user
import inspected_models as models
import pytest
import torch
from inspected_models import SIZES, VOCAB, WIDTH, Sharded, Step, Trained
from inspecting import inspect

from compiled_loss.inspection import InspectionError

pytestmark = [
    pytest.mark.xdist_group("inspection"),  # one worker holds the children
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="GPU CODE IS NOT TESTED: it is generated on Linux"),
    pytest.mark.skipif(find_spec("transformers") is None, reason="MODELS ARE NOT TESTED: transformers is not there"),
]

BATCH, LENGTH = 2, 128
N = BATCH * LENGTH
INPUTS = f"int64[{BATCH},{LENGTH}]:0..{VOCAB - 1}", f"int64[{BATCH},{LENGTH}]:0..{VOCAB - 1}"
HEADS, WIDE = SIZES["num_attention_heads"], SIZES["head_dim"]


def block_operations():
    """Of the GEMMs of one block, forward: queries, output, keys and values, and the three of the MLP."""
    attention = WIDTH * WIDE * (2 * HEADS + 2 * SIZES["num_key_value_heads"])
    return 2 * N * (attention + 3 * WIDTH * SIZES["intermediate_size"])


@functools.cache
def plain():
    """A step as most people write it; a model that is made on the CPU at import."""
    return inspect(Step(), *INPUTS)


def gemm_operations(found):
    return sum(launch.operations for p in found.passes for launch in p.gemms)


HEAD_OPERATIONS = 2 * N * WIDTH * VOCAB
LOGITS = N * VOCAB * 2


def of_loss(p):
    return [launch for launch in p.launches if launch.of_loss]


# Where a model is made ----------------------------------------------------------------------------------------------


def test_random_initialisation():
    found = inspect(user.initialised, "f32[64,32]:grad", backward=False)
    assert found.launches


def test_an_import_that_raises():
    with pytest.raises(
        InspectionError, match=r"(?s)^Raises: its import raised, .*ZeroDivisionError: of mine"
    ) as caught:
        inspect(user.Raises(), "f32[8]")
    assert "while it was inspected" not in str(caught.value)


def test_a_model_made_at_import():
    found = plain()
    assert gemm_operations(found) == 3 * (block_operations() + HEAD_OPERATIONS)
    assert [g.direction for g in found.graphs] == ["forward", "backward"] and found.breaks == ()
    scores = BATCH * HEADS * LENGTH**2
    assert max(s.size for s in found.saved) == LOGITS  # and not the scores, of which a fused attention keeps none
    assert 2 * scores < LOGITS
    assert len(found.forward.attention) == len(found.backward.attention) == 1
    parameters = WIDTH * (2 * VOCAB + 3) + block_operations() // (2 * N)
    assert found.backward.launches[-1].live_bytes >= 2 * parameters  # their gradients


@pytest.mark.slow
@pytest.mark.parametrize("where", ["meta", "cuda"])  # in CI of other models: test_other_models
def test_a_model_made_anywhere(where):
    found = inspect(Step(where=where), *INPUTS)
    assert gemm_operations(found) == gemm_operations(plain())
    assert found.peak_bytes == plain().peak_bytes and found.saved_bytes == plain().saved_bytes


@pytest.mark.slow
def test_a_model_made_inside():
    found = inspect(models.inside, *INPUTS)
    assert gemm_operations(found) == 3 * (block_operations() + HEAD_OPERATIONS)


# What the loss has --------------------------------------------------------------------------------------------------


def test_share_of_the_loss():
    theirs, ours = plain(), inspect(Step(models.our_loss_of), *INPUTS)
    assert theirs.loss == ("cross_entropy", "lm_head") and ours.loss == ("compiled_loss",)
    for found in (theirs, ours):
        gemms = [launch for p in found.passes for launch in of_loss(p) if launch.kind == "gemm"]
        assert sum(launch.operations for launch in gemms) == 3 * HEAD_OPERATIONS
        assert launches_of_loss(found) >= 4
        assert 0 < found.roofline_seconds(of_loss=True) < found.roofline_seconds()
    small = 2 * N * WIDTH + 32 * N  # the head's input, and some numbers a token
    assert LOGITS <= theirs.loss_saved_bytes <= LOGITS + small
    assert 0 <= ours.loss_saved_bytes - 2 * VOCAB * WIDTH <= small  # the gradients
    assert theirs.peak_bytes >= theirs.loss_peak_bytes >= LOGITS
    assert ours.loss_peak_bytes >= LOGITS + 2 * VOCAB * WIDTH  # a chunk, and dW, which no launch has written yet
    assert [g.of_loss for g in theirs.forward.gemms] == [False] * (len(theirs.forward.gemms) - 1) + [True]
    assert sum(g.of_loss for g in theirs.backward.gemms) == 2


def launches_of_loss(found):
    return sum(len(of_loss(p)) for p in found.passes)


def test_few_launches_of_the_unchunked_loss():
    assert launches_of_loss(plain()) <= 12


def test_few_launches_of_the_loss():
    assert launches_of_loss(inspect(Step(models.our_loss_of), *INPUTS)) <= 12


def test_loss_option_names_the_loss():
    found = inspect(Step(models.our_loss_of), *INPUTS, loss="mlp")
    assert {"mlp", "compiled_loss"} == set(found.loss)
    found = inspect(user.linear_cross_entropy, "f32[64,32]:grad", "f32[1000,32]:grad", "i64[64]:0..999")
    assert found.loss == ()  # nobody knows whether the product is a head
    found = inspect(user.linear_cross_entropy, *found.inputs, loss=["linear_cross_entropy"])
    assert all(gemm.of_loss for p in found.passes for gemm in p.gemms)


# How people train ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "attention", "where"),
    [("Qwen3", "sdpa", "meta"), pytest.param("Gemma2", "eager", "cuda", marks=pytest.mark.slow)],
)
def test_other_models(kind, attention, where):
    found = inspect(Step(kind=kind, attention=attention, where=where), *INPUTS)
    scores = 0 if attention == "sdpa" else 2 * 2 * BATCH * HEADS * LENGTH**2 * WIDE
    assert gemm_operations(found) == 3 * (block_operations() + HEAD_OPERATIONS + scores)
    assert found.breaks == () and found.loss


@pytest.mark.slow
def test_flex_attention_under_autocast():
    found = inspect(Step(models.autocast, attention="flex_attention", dtype=torch.float32), *INPUTS)
    assert {g.dtype for p in found.passes for g in p.gemms} == {"bfloat16"}
    assert len(found.forward.attention) == len(found.backward.attention) == 1
    assert gemm_operations(found) == 3 * (block_operations() + HEAD_OPERATIONS)
    assert any("FlexAttention" in note for note in found.notes)


@pytest.mark.slow
def test_dropout_and_activation_checkpointing():
    found = inspect(Step(models.checkpointed, attention_dropout=0.1), *INPUTS)
    assert gemm_operations(found) == 4 * block_operations() + 3 * HEAD_OPERATIONS
    assert found.saved_bytes - found.loss_saved_bytes < plain().saved_bytes - plain().loss_saved_bytes
    assert found.forward.attention


@pytest.mark.slow
def test_an_optimizer_in_the_step_of_a_tied_head():
    found = inspect(Trained(models.trained, tie_word_embeddings=True), *INPUTS, backward=False)
    assert gemm_operations(found) == 3 * (block_operations() + HEAD_OPERATIONS)
    assert found.backward is None and found.peak_bytes > LOGITS


@pytest.mark.slow
def test_tied_head():
    found = inspect(Step(tie_word_embeddings=True), *INPUTS)
    assert gemm_operations(found) == gemm_operations(plain())
    assert found.peak_bytes < plain().peak_bytes  # one gradient for both


@pytest.mark.slow
def test_nested_compile_regions():
    found = inspect(Step(models.in_regions, num_hidden_layers=3), *INPUTS)
    assert gemm_operations(found) == 3 * (3 * block_operations() + HEAD_OPERATIONS)
    assert found.breaks == () and found.forward.attention


def test_fsdp2_model():
    found = inspect(Sharded(), *INPUTS)
    sent = {one.kind for p in found.passes for one in p.collectives}
    assert {"all-gather", "reduce-scatter"} <= sent
    assert {one.ranks for p in found.passes for one in p.collectives} == {8}
    assert gemm_operations(found) == 3 * (block_operations() + HEAD_OPERATIONS)


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cuda:sm_80", "cuda:sm_100", "hip:gfx942"])
@pytest.mark.parametrize(
    ("step", "backward"),
    [
        (Step(), True),
        (Step(models.our_loss_of), True),
        (Step(kind="Qwen3"), True),
        (Step(kind="Gemma2", attention="eager"), True),
        (Step(kind="Gemma2", attention="flex_attention"), True),
        (Step(attention="flex_attention"), True),
        (Step(models.in_regions, num_hidden_layers=3), True),
        (Step(models.checkpointed), True),
        (Trained(models.trained), False),
        (Sharded(), True),
    ],
    ids=lambda v: type(v).__name__,
)
def test_other_gpus(device, step, backward):
    found = inspect(step, *INPUTS, device=device, backward=backward, assemble=True, first_only=True)
    assert gemm_operations(found) >= 3 * (block_operations() + HEAD_OPERATIONS)
    assert all(k.configurations for k in found.kernels if k.source and "triton" in k.name)
