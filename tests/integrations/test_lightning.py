"""Lightning's automatic optimization with our losses: a step's tokens weigh alike."""

import pytest
import ranks
import torch
import torch.distributed as dist
from lightning_models import MICROBATCHES, QUIET, B, lightning, loader, make_module, plain_steps, rows
from torch.nn import functional as F

from compiled_loss import linear_cross_entropy
from compiled_loss.testing import assert_within_error_budget

pytestmark = [
    pytest.mark.xdist_group("lightning"),  # one worker imports it: that takes seconds
    pytest.mark.filterwarnings("ignore::UserWarning:lightning.*", "ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
]
CLOSE = {"rtol": 1e-11, "atol": 1e-13}  # fp64, two steps of sums of fewer than 200 numbers


def fit(module, precision="64-true", callbacks=None, **options):
    """Train for one epoch, with the callback that is tested or others."""
    if callbacks is None:
        callbacks = [label_token_mean()()]
    options = {**QUIET, "accumulate_grad_batches": MICROBATCHES, **options}
    trainer = lightning().Trainer(precision=precision, callbacks=callbacks, **options)
    trainer.fit(module, loader())
    return trainer


def label_token_mean():
    lightning()
    from compiled_loss.integrations.lightning import LabelTokenMean

    return LabelTokenMean


def whole_steps():
    """The batch of each optimizer step in one piece: three microbatches, then the two that are left."""
    inputs, labels = rows()
    cut = MICROBATCHES * B
    return [(inputs[:cut], labels[:cut]), (inputs[cut:], labels[cut:])]


@pytest.mark.parametrize("clip", [0.0, 0.1])
def test_steps_are_those_of_a_plain_loop(clip):
    module = make_module()
    fit(module, gradient_clip_val=clip)
    gradients, parameters = plain_steps(whole_steps(), torch.float64, clip=clip)
    assert len(module.gradients) == len(gradients) == 2
    torch.testing.assert_close(module.gradients, gradients, **CLOSE)
    torch.testing.assert_close(list(module.parameters()), parameters, **CLOSE)


def test_lightning_alone_does_not():
    """The data tell a mean over tokens from a mean of means."""
    module = make_module()
    fit(module, callbacks=[])
    gradients, _ = plain_steps(whole_steps(), torch.float64)
    assert (module.gradients[0][0] - gradients[0][0]).norm() > 0.1 * gradients[0][0].norm()


@pytest.mark.parametrize("backend", [None, "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_bf16_mixed(backend):
    """As accurate as a plain loop under autocast whose logits are upcast, with a step that is compiled as one graph."""
    module = make_module(backend)
    fit(module, "bf16-mixed")
    truth, _ = plain_steps(whole_steps()[:1], torch.float64)
    baseline, _ = plain_steps(whole_steps()[:1], torch.float32, autocast=True)
    for mine, theirs, exact in zip(module.gradients[0], baseline[0], truth[0], strict=True):
        assert mine.dtype == torch.float32
        assert_within_error_budget(mine, theirs, exact)


@pytest.mark.slow
def test_a_compiled_lightning_module():
    """Lightning compiles the training step itself; one that calls `log` Dynamo 2.13 does not trace, ours or not."""
    module = make_module(log=False)
    fit(torch.compile(module, backend="aot_eager"))
    gradients, _ = plain_steps(whole_steps(), torch.float64)
    torch.testing.assert_close(module.gradients, gradients, **CLOSE)


def test_what_is_logged_is_a_mean_over_tokens():
    """With `batch_size=count`, a tensor, of parameters that do not change."""
    module = make_module()
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.0)
    trainer = fit(module)
    inputs, labels = rows()
    logits = module.model.head(module.model.hidden(inputs)).flatten(0, 1)
    log_p = logits[labels.flatten() != -100].log_softmax(-1)
    expected = {"loss": F.cross_entropy(logits, labels.flatten()), "entropy": -(log_p.exp() * log_p).sum(-1).mean()}
    for name, value in expected.items():  # Lightning logs in fp32
        torch.testing.assert_close(trainer.callback_metrics[name].double(), value, rtol=1e-6, atol=0.0)


def test_counts_of_a_model_that_shifts():
    seen = []

    def count(batch):
        seen.append(batch)
        return (batch["labels"][:, 1:] != -100).sum()

    module = make_module()
    module.training_step = lambda batch, batch_idx: linear_cross_entropy(
        module.model.hidden(batch["inputs"]), module.model.head.weight, batch["labels"], shift=1
    )
    fit(module, callbacks=[label_token_mean()(count)])
    steps = [(inputs, F.pad(labels[:, 1:], (0, 1), value=-100)) for inputs, labels in whole_steps()]
    gradients, _ = plain_steps(steps, torch.float64)
    assert len(seen) == 5
    torch.testing.assert_close(module.gradients, gradients, **CLOSE)


def test_an_epoch_left_within_a_step():
    """Lightning zeroes the gradients of its microbatches, and their tokens count no more."""
    module = make_module()
    module.on_train_batch_start = lambda batch, batch_idx: -1 if module.current_epoch == 0 and batch_idx == 1 else None
    fit(module, max_epochs=2)
    gradients, _ = plain_steps(whole_steps(), torch.float64)
    torch.testing.assert_close(module.gradients, gradients, **CLOSE)


def test_a_loss_in_bf16():
    """Its gradient is handed on in its dtype."""
    module = make_module()
    module.training_step = lambda batch, batch_idx: (
        F.cross_entropy(
            module.model.head(module.model.hidden(batch["inputs"])).flatten(0, 1),
            batch["labels"].flatten(),
            reduction="sum",
        )
        / (batch["labels"] != -100).sum().clamp(min=1)
    )
    fit(module, "bf16-true")
    truth, _ = plain_steps(whole_steps()[:1], torch.float64)
    for mine, exact in zip(module.gradients[0], truth[0], strict=True):
        assert mine.dtype == torch.bfloat16
        assert (mine - exact).norm() < 8 * 2**-8 * exact.norm()  # of bf16's roundings on the way; three are summed


def test_steps_without_a_loss():
    """Lightning goes on where `training_step` returns None: here in the whole second step."""
    module = make_module()
    step = module.training_step
    module.training_step = lambda batch, batch_idx: step(batch, batch_idx) if batch_idx < MICROBATCHES else None
    module.on_before_optimizer_step = lambda optimizer: None  # there is no gradient to keep
    fit(module)
    _, parameters = plain_steps(whole_steps()[:1], torch.float64)
    torch.testing.assert_close(list(module.parameters()), parameters, **CLOSE)


def test_counts_that_are_ints():
    module = make_module()
    fit(module, callbacks=[label_token_mean()(lambda batch: int((batch["labels"] != -100).sum()))])
    gradients, _ = plain_steps(whole_steps(), torch.float64)
    torch.testing.assert_close(module.gradients, gradients, **CLOSE)


@pytest.mark.parametrize("batch", [None, torch.zeros(2, 3), [torch.zeros(2)], {"input_ids": 1}, {"labels": [1, 2]}])
def test_batches_without_labels(batch):
    with pytest.raises(TypeError, match=r"^batch: expected a Tensor as batch\[\"labels\"\], got .*: give .*count="):
        label_token_mean()().count(batch)


@pytest.mark.parametrize("count", [None, torch.ones(2)])
def test_counts_that_are_none(count):
    with pytest.raises((TypeError, ValueError), match=r"^count: expected one number of label tokens, got "):
        fit(make_module(), callbacks=[label_token_mean()(lambda batch: count)])


def test_given_twice():
    with pytest.raises(ValueError, match=r"^LabelTokenMean: expected one among the Trainer's callbacks, got 2: remove"):
        fit(make_module(), callbacks=[label_token_mean()(), label_token_mean()()])


def test_refused():
    module = make_module()
    module.automatic_optimization = False
    with pytest.raises(ValueError, match=r"expected automatic optimization, got Module with"):
        fit(module, accumulate_grad_batches=1)

    class ByItself(lightning().strategies.SingleDeviceStrategy):
        handles_gradient_accumulation = True

    with pytest.raises(ValueError, match=r"expected gradients that Lightning accumulates, got ByItself, which"):
        fit(make_module(), strategy=ByItself("cpu"))


# Ranks --------------------------------------------------------------------------------------------------------------


def module_on_ranks(name):
    """A LightningModule that DDP or FSDP2 has trained."""
    strategies = lightning().strategies
    module = make_module()
    if name == "ddp":
        strategy = strategies.DDPStrategy()
    else:
        strategy = strategies.ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
        module.configure_model = lambda: shard(module)
    fit(module, precision="32-true", strategy=strategy, devices=2)
    return module


def shard(module):
    mesh = module.device_mesh["data_parallel"]
    for part in (module.model.body, module.model):
        torch.distributed.fsdp.fully_shard(part, mesh=mesh)
    module.step = module.model


def on_a_rank():
    """What it saw, and its gradients, by strategy."""
    ranks.as_torchrun()
    modules = {name: module_on_ranks(name) for name in ("ddp", "fsdp2")}
    return {name: (module.seen, module.gradients) for name, module in modules.items()}


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo for processes on CPUs")
def test_ranks(tmp_path):
    """As accurate as one process of the same precision, which takes all ranks' microbatches in one piece."""
    lightning()
    found = ranks.run(on_a_rank, 2, tmp_path, limit=200)
    for name in ("ddp", "fsdp2"):
        microbatches = [batch for rank in found for batch in rank[name][0]]
        assert len(microbatches) == 2 * MICROBATCHES  # one step
        step = [tuple(torch.cat([batch[key] for batch in microbatches]) for key in ("inputs", "labels"))]
        truth, baseline = (plain_steps(step, dtype)[0][0] for dtype in (torch.float64, torch.float32))
        for rank in found:
            (gradients,) = rank[name][1]
            for mine, theirs, exact in zip(gradients, baseline, truth, strict=True):
                assert_within_error_budget(mine, theirs, exact)
