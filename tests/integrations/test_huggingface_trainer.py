"""Our losses in the Trainer of Hugging Face `transformers`."""

import copy

import pytest
import torch
from torch.utils.data import SequentialSampler
from transformers_models import transformers
from transformers_training import TIGHT, TOKENS, V, batch, exact, make, plain

from compiled_loss.huggingface import LinearCausalLMLoss, causal_lm_loss

pytestmark = pytest.mark.xdist_group("transformers")  # one worker imports it: that takes seconds


def run(model, tmp_path, rows, label_smoothing_factor=0.0, **options):
    """What `Trainer.train` returns for microbatches of 2 rows, 3 of them a step."""
    library = transformers()

    class InOrder(library.Trainer):
        def _get_train_sampler(self, *_):
            return SequentialSampler(self.train_dataset)

    arguments = library.TrainingArguments(
        output_dir=tmp_path,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
        num_train_epochs=1,
        learning_rate=0.1,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        label_smoothing_factor=label_smoothing_factor,
    )
    return InOrder(model, arguments, train_dataset=rows, **options).train()


def collate(rows):
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


@pytest.mark.parametrize("through", ["compute_loss_func", "loss_function"])
def test_trainer_gradient_accumulation(through, tmp_path):
    """Two steps of three microbatches, whose numbers of labels differ, and a third of two rows left over."""
    model = exact(make("Llama"))
    expected = copy.deepcopy(model)
    ids, labels = batch(rows=14)
    rows = [{"input_ids": i, "labels": t} for i, t in zip(ids, labels, strict=True)]
    counts = (labels[:, 1:] != -100).sum(-1).reshape(-1, 2).sum(-1)
    assert len(set(counts[:3].tolist())) > 1  # or a mean of means would pass

    if through == "loss_function":
        model.loss_function = causal_lm_loss
        result = run(model, tmp_path, rows, data_collator=collate)
    else:
        loss_fn = LinearCausalLMLoss(model, chunking=TOKENS)
        seen = []

        def compute(outputs, labels, num_items_in_batch=None):
            seen.append((outputs.logits.shape, int(num_items_in_batch)))
            return loss_fn(outputs, labels, num_items_in_batch)

        result = run(
            model,
            tmp_path,
            rows,
            compute_loss_func=compute,
            data_collator=lambda rows: collate(rows) | loss_fn.forward_keywords,
        )
        steps = [int(part.sum()) for part in counts.split(3)]
        assert seen == [
            ((2, 1, V), n) for n, microbatches in zip(steps, (3, 3, 1), strict=True) for _ in range(microbatches)
        ]

    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1)
    losses = []
    for big in (slice(0, 6), slice(6, 12), slice(12, 14)):
        optimizer.zero_grad()
        losses.append(plain(expected(input_ids=ids[big]).logits, labels[big], (labels[big, 1:] != -100).sum()))
        losses[-1].backward()
        optimizer.step()
    torch.testing.assert_close(list(model.parameters()), list(expected.parameters()), **TIGHT)
    # The Trainer adds the losses of microbatches up in fp32.
    torch.testing.assert_close(result.training_loss, float(torch.stack(losses).detach().mean()), rtol=1e-6, atol=0)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_trainer_label_smoothing(smoothing, tmp_path):
    """It smooths the loss that models compute, but not that of a compute_loss_func."""
    model = make("Llama", torch.float64)
    ids, labels = batch(rows=6)
    rows = [{"input_ids": i, "labels": t} for i, t in zip(ids, labels, strict=True)]

    def trained(model, tmp_path, **options):
        result = run(model, tmp_path, rows, label_smoothing_factor=smoothing, **options)
        return result.training_loss, *model.parameters()

    def ours(value):
        mine = copy.deepcopy(model)
        loss_fn = LinearCausalLMLoss(mine, label_smoothing=value)
        return mine, {
            "compute_loss_func": loss_fn,
            "data_collator": lambda rows: collate(rows) | loss_fn.forward_keywords,
        }

    mine, options = ours(smoothing)
    found = trained(mine, tmp_path / "mine", **options)
    expected = trained(copy.deepcopy(model), tmp_path / "theirs", data_collator=collate)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=0)
    # Their logits are fp32: eps times gradients of up to 5.
    torch.testing.assert_close(found[1:], expected[1:], rtol=0, atol=1e-6)
    mine, options = ours(0.1)
    with pytest.raises(ValueError, match=rf"^label_smoothing: expected {smoothing}, the Trainer's .* got 0.1: Linear"):
        trained(mine, tmp_path / "other", **options)
