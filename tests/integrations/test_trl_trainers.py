"""What fuse_trainer replaces in TRL's trainers, what it refuses, and that unfuse_trainer leaves nothing."""

import copy
import functools
import types

import pytest
import torch

pytest.importorskip("trl", reason="the extra 'integrations' is not installed")

import trl
from trl_trainers import V, curves, lora, model, quiet, saved, trainer

from compiled_loss import Chunking
from compiled_loss.integrations.transformers import fuse_head
from compiled_loss.integrations.trl import fuse_trainer, unfuse_trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of what these packages import
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

KERNELS = "trl.trainer.utils._ChunkedLogProbFunction", "trl.trainer.distillation_trainer.ChunkedDivergenceFunction"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("model"), model())


@pytest.fixture
def make(folder, tmp_path):
    return functools.partial(trainer, folder=folder, output=tmp_path)


@pytest.fixture
def no_kernels(monkeypatch):
    """TRL's own, and full logits, raise."""

    def raising(*_):
        raise AssertionError("TRL's own kernel is called")

    for name in KERNELS:
        monkeypatch.setattr(name, types.SimpleNamespace(apply=raising))


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize("name", ["SFT", "DPO", "KTO", "GRPO", "RLOO", "Distillation"])
def test_their_kernels_are_not_called(name, make):
    made = make(name, max_steps=1)
    with pytest.raises(AssertionError, match="is called"), quiet():
        made.train()
    made = make(name, max_steps=1)
    fuse_trainer(made)
    assert curves(made)["loss"].isfinite().all()


@pytest.mark.parametrize("name", ["DPO", "Distillation", "GKD"])
def test_unfuse(name, make):
    """To the attribute, before and after training."""
    made = make(name, max_steps=1)
    models = [value for value in vars(made).values() if isinstance(value, torch.nn.Module)]
    parts = [part for which in models for part in which.modules()]

    def state():
        forwards = [vars(part).get("forward") for part in parts]
        return [vars(made).keys(), *(vars(part).keys() for part in parts), *forwards]

    before = state()
    fuse_trainer(made)
    fuse_trainer(made, chunking=Chunking(chunk_size=4))
    unfuse_trainer(made)
    assert state() == before
    unfuse_trainer(made)
    fuse_trainer(made)
    curves(made)
    unfuse_trainer(made)
    left = [getattr(vars(part).get("forward"), "__func__", None) for part in parts]
    assert not [forward for forward in left if getattr(forward, "__module__", "").startswith("compiled_loss")]


def test_chunking_reaches_the_loss(make):
    made = make("SFT", max_steps=1)
    fuse_trainer(made, chunking=Chunking(max_label_tokens=1))
    with pytest.raises(ValueError, match="max_label_tokens"), quiet():
        made.train()
    fuse_trainer(made, chunking=Chunking(max_label_tokens=0.9))
    assert curves(made)["loss"] > 1


@pytest.mark.parametrize("name", ["SFT", "DPO", "GRPO", "Distillation", "GKD"])
def test_bf16(name, make):
    """Accelerate's autocast is around the reference's forward before ours is there, and later around ours."""
    options = {"bf16": True, "max_steps": 2}
    theirs, made = curves(make(name, **options)), make(name, **options)
    fuse_trainer(made)
    ours = curves(made)
    for which in theirs:
        tolerance = 1e-5 if name == "Distillation" else 2**-6  # TRL calls its models beneath the autocast, in fp32
        close = torch.isclose(ours[which], theirs[which], rtol=tolerance, atol=tolerance)
        assert close.all(), f"{which}: {ours[which]}, TRL's {theirs[which]}"
    fuse_trainer(made, chunking=Chunking(chunk_size=4))  # finds its own inside of Accelerate's
    unfuse_trainer(made)


def test_head_in_fp32(make):
    options = {"model_init_kwargs": {"dtype": "bfloat16"}, "cast_lm_head_to_fp32": True, "max_steps": 2}
    theirs, made = curves(make("GRPO", **options)), make("GRPO", **options)
    fuse_trainer(made)
    ours = curves(made)
    torch.testing.assert_close(ours["entropy"][0], theirs["entropy"][0], rtol=1e-6, atol=0)
    torch.testing.assert_close(ours["loss"], theirs["loss"], rtol=0, atol=2**-7)


def test_saved_head_of_peft(make):
    """A head that PEFT trains as a whole."""
    options = {"peft_config": lora(modules_to_save=["lm_head"])}
    theirs, made = curves(make("SFT", **options)), make("SFT", **options)
    fuse_trainer(made)
    ours = curves(made)
    torch.testing.assert_close(ours["loss"], theirs["loss"], rtol=1e-6, atol=0)


def test_evaluation(make):
    """With metrics of the logits, and without."""
    data = make("SFT").train_dataset.select(range(2))

    def compute_metrics(found):
        return {"most": float(found.predictions.argmax(-1).mean())}

    for options in ({}, {"compute_metrics": compute_metrics}):
        logged = []
        for fuse in (lambda _: None, fuse_trainer):
            made = make("SFT", eval_dataset=data, **options)
            fuse(made)
            with quiet():
                logged.append(made.evaluate())
        assert logged[0].keys() == logged[1].keys()
        for key in ("eval_loss", "eval_entropy", *(["eval_most"] if options else [])):
            assert logged[1][key] == pytest.approx(logged[0][key], rel=1e-6)


def test_batch_without_a_label(make):
    made = make("SFT")
    fuse_trainer(made)
    ids = torch.tensor([[3, 4, 5]])
    outputs = made.model(input_ids=ids, labels=torch.full_like(ids, -100), fused_lm_head=True)
    assert outputs.loss == 0 and not outputs.log_probs.any()
    outputs.loss.backward()
    assert all(not parameter.grad.any() for parameter in made.model.parameters())


def test_outputs(make):
    """All of them, of labels that are shifted already, as context parallelism gives them, and another count."""
    made = make("DPO", use_weighting=True)
    ids = torch.tensor([[3, 4, 5, 6]])
    given = {"input_ids": ids, "shift_labels": torch.tensor([[4, -100, 6, 7]]), "num_items_in_batch": 5}
    theirs = made.model(**given, fused_lm_head=True)
    fuse_trainer(made)
    ours = made.model(**given, fused_lm_head=True)
    assert ours.keys() == theirs.keys() and len(ours) == 7
    for name, expected in theirs.items():
        assert ours[name].requires_grad == expected.requires_grad
        torch.testing.assert_close(ours[name], expected)
    assert made.model(ids).logits.shape == (1, 4, V)


def test_refused(make, folder, tmp_path):
    from datasets import Dataset

    data = Dataset.from_list([{"prompt": "w1", "chosen": "w2", "rejected": "w3"}])
    with quiet():
        made = trl.RewardTrainer(
            model=folder,
            args=trl.RewardConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none"),
            train_dataset=data,
        )
    with pytest.raises(TypeError, match="got RewardTrainer, whose model's head has one column"):
        fuse_trainer(made)
    ORPOTrainer = pytest.importorskip("trl.experimental.orpo").ORPOTrainer
    with pytest.raises(TypeError, match="got ORPOTrainer, which is none of them"):
        fuse_trainer(object.__new__(ORPOTrainer))
    made = make("SFT")
    made.model.forward = types.MethodType(type(made.model).forward, made.model)
    with pytest.raises(ValueError, match=r"expected a LlamaForCausalLM with the fused head of TRL 1\.16"):
        fuse_trainer(made)


def test_class_of_a_user(make, folder):
    class Mine(trl.SFTTrainer):
        pass

    made = make("SFT")
    made.__class__ = Mine
    fuse_trainer(made)
    assert curves(made)["loss"].isfinite().all()


def test_a_second_trainer_of_a_model(make, no_kernels, monkeypatch):
    """To which TRL gives a head again, over what Accelerate put around ours in the first."""
    first = make("SFT", bf16=True)
    fuse_trainer(first)
    first.train()
    monkeypatch.setattr("trl_trainers.model_of", lambda _folder: first.model)
    second = make("SFT", bf16=True)
    fuse_trainer(second)
    second.train()


def test_a_model_whose_head_is_fused_already(make):
    made = make("SFT")
    fuse_head(made.model)
    with pytest.raises(ValueError, match="unfuse_head\\(model\\) first, fuse_trainer"):
        fuse_trainer(made)


def test_copy_of_a_model_is_refused(make):
    """TRL's forward is bound to the original, and would mix the weights of both."""
    made = make("SFT")
    fuse_trainer(made)
    ids = torch.tensor([[3, 4, 5]])
    with pytest.raises(ValueError, match="got a copy of it"):
        copy.deepcopy(made.model)(input_ids=ids, labels=ids, fused_lm_head=True)


def test_prompt_tuning(make):
    """PEFT puts tokens of its own before the inputs, and labels of -100 before the labels."""
    peft = pytest.importorskip("peft")
    options = {"peft_config": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)}
    theirs, made = curves(make("SFT", **options)), make("SFT", **options)
    fuse_trainer(made)
    ours = curves(made)
    torch.testing.assert_close(ours["loss"], theirs["loss"], rtol=1e-6, atol=0)


def test_adapter_on_the_head(make):
    """TRL refuses it where the trainer is made, for its own head would not see it; ours does."""
    made = make("SFT", peft_config=lora())
    made.model.add_adapter("more", lora(target_modules=["lm_head"], init_lora_weights=False))
    made.model.set_adapter("more")
    fuse_trainer(made)
    ids = torch.tensor([[3, 4, 5, 6]])
    expected = made.model(ids).logits[0, :3].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
    found = made.model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs[0]
    torch.testing.assert_close(found, expected)


def test_sampled_answers(make):
    """The policy still generates, and trains on what it sampled."""

    def run(fuse):
        made = make("GRPO", beta=0.0)
        del made.model.generate
        fuse(made)
        return curves(made)

    theirs, ours = run(lambda _: None), run(fuse_trainer)
    assert ours["completions/mean_length"].tolist() == theirs["completions/mean_length"].tolist()
    assert ours["reward"].tolist() == theirs["reward"].tolist()
    torch.testing.assert_close(ours["entropy"], theirs["entropy"], rtol=1e-5, atol=0)


def test_softcap_that_they_do_not_know(tmp_path):
    """TRL reads names of a config, of which RecurrentGemma has another; the model's own forward has it."""
    kind = "RecurrentGemma"
    config = {"num_key_value_heads": 1, "lru_width": 32, "attention_window_size": 8, "logits_soft_cap": 2.0}
    made = trainer("SFT", saved(tmp_path / "model", model(kind, num_hidden_layers=3, **config)), tmp_path)
    ids = torch.tensor([[3, 4, 5, 6]])
    expected = made.model(ids).logits[0, :3].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
    theirs = made.model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs[0]
    assert (theirs - expected).abs().max() > 0.1
    fuse_trainer(made)
    ours = made.model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs[0]
    torch.testing.assert_close(ours, expected)
