"""Fused heads in the Trainer of Hugging Face `transformers`, and in what Accelerate does to models."""

import copy

import pytest
import torch
from torch.utils.data import SequentialSampler
from transformers_models import transformers
from transformers_training import V, batch, exact, make, plain

from compiled_loss.integrations.transformers import DeferredLogits, fuse_head, unfuse_head

pytestmark = pytest.mark.xdist_group("transformers")  # one worker imports it: that takes seconds


def trainer(model, folder, ids, labels, **options):
    """For microbatches of 2 rows, 3 of them a step; its options and TrainingArguments'."""
    library, seen = transformers(), []
    rows = [{"input_ids": i, "labels": t} for i, t in zip(ids, labels, strict=True)]

    class InOrder(library.Trainer):
        def _get_train_sampler(self, *_):
            return SequentialSampler(self.train_dataset)

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            seen.append(type(outputs["logits"]))
            return (loss, outputs) if return_outputs else loss

    arguments = {
        "output_dir": folder,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 4,
        "gradient_accumulation_steps": 3,
        "num_train_epochs": 1,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    names = {"compute_metrics", "eval_dataset"}
    given = {name: options.pop(name) for name in names & set(options)}
    made = InOrder(
        model,
        library.TrainingArguments(**arguments | options),
        train_dataset=rows,
        data_collator=lambda rows: {name: torch.stack([row[name] for row in rows]) for name in rows[0]},
        **given,
    )
    return made, seen


def test_trainer_gradient_accumulation(tmp_path):
    """Steps of three microbatches whose numbers of labels differ, and a last one of two rows; columns are read off."""
    model = exact(make("Llama"))
    expected = copy.deepcopy(model)
    ids, labels = batch(rows=14)
    fuse_head(model)
    made, seen = trainer(model, tmp_path, ids, labels)
    result = made.train()
    assert seen == [DeferredLogits] * 7
    optimizer, losses = torch.optim.SGD(expected.parameters(), lr=0.1), []
    for big in (slice(0, 6), slice(6, 12), slice(12, 14)):
        optimizer.zero_grad()
        losses.append(plain(expected(input_ids=ids[big]).logits, labels[big], (labels[big, 1:] != -100).sum()))
        losses[-1].backward()
        optimizer.step()
    torch.testing.assert_close(list(model.parameters()), list(expected.parameters()), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(result.training_loss, float(torch.stack(losses).detach().mean()), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("smoothing", "checkpointing"), [(0.3, False), (0.1, True)])
def test_trainer_smoothing_and_checkpointing(smoothing, checkpointing, tmp_path):
    """The same as without: theirs rounds logits to fp32."""
    model, (ids, labels) = make("Llama", torch.float64), batch(rows=6)
    found = []
    for fuse in (False, True):
        mine = copy.deepcopy(model)
        if fuse:
            fuse_head(mine)
        if checkpointing:
            enable = getattr(mine, "activation_checkpointing_enable", None) or mine.gradient_checkpointing_enable
            enable()  # the second is its name before 5.23
        folder = tmp_path / str(fuse)
        made, seen = trainer(mine, folder, ids, labels, label_smoothing_factor=smoothing, learning_rate=0.5)
        result = made.train()
        assert seen == [DeferredLogits if fuse else torch.Tensor] * 3
        found.append((result.training_loss, list(mine.parameters())))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-6, atol=0)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=0, atol=1e-6)


def test_trainer_autocast_evaluation_and_metrics(tmp_path):
    """Under bf16=True Accelerate wraps the model's forward; evaluation has logits."""
    model, (ids, labels) = make("Llama"), batch(rows=6)
    expected, metrics = copy.deepcopy(model), []

    def compute_metrics(predictions):
        metrics.append(predictions.predictions.shape)
        return {"mean": float(predictions.predictions.mean())}

    fuse_head(model, statistics=("entropy",))
    rows = [{"input_ids": i, "labels": t} for i, t in zip(ids[:4], labels[:4], strict=True)]
    made, seen = trainer(model, tmp_path, ids, labels, bf16=True, compute_metrics=compute_metrics, eval_dataset=rows)
    before = made.evaluate()
    made.train()
    after = made.evaluate()
    assert seen == [torch.Tensor] + [DeferredLogits] * 3 + [torch.Tensor] and metrics == [(4, 7, V)] * 2
    assert after["eval_loss"] < before["eval_loss"]
    theirs, _ = trainer(expected, tmp_path / "theirs", ids, labels, bf16=True, eval_dataset=rows)
    theirs.train()
    # bf16 logits are of size 1, and two steps of 0.1 move the loss by less than its own rounding in them.
    assert abs(theirs.evaluate()["eval_loss"] - after["eval_loss"]) <= 2**-8 * after["eval_loss"]
    unfuse_head(made.model)
    model.train()
    assert isinstance(model(input_ids=ids, labels=labels).logits, torch.Tensor)
