"""The plugin of Axolotl: by its hooks, and in Axolotl's own training where all that it imports is installed."""

import importlib.util
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from transformers_models import batch, llama

ROOT = Path(__file__).parents[2]
NAME = "compiled_loss.integrations.axolotl.CompiledLossPlugin"
pytestmark = [
    pytest.mark.xdist_group("transformers"),  # which it imports
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture
def base():
    """Axolotl's module of plugins, which needs little of what Axolotl needs, and none that were registered before."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = pytest.importorskip("axolotl.integrations.base", exc_type=ImportError)
    module.PluginManager._instance = None
    return module


@pytest.fixture
def manager(base):
    """Axolotl's manager with the plugin, as it makes it of the YAML's line."""
    manager = base.PluginManager.get_instance()
    manager.register(NAME)
    assert list(manager.plugins) == [NAME]
    return manager


def config(**keys):
    from axolotl.utils.dict import DictDefault

    return DictDefault(keys)


def test_the_head_is_fused_once_adapters_are_loaded(manager):
    model = llama().train()
    ids, labels = batch()
    expected = model(input_ids=ids, labels=labels).loss
    expected.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    keys = config(compiled_loss_chunking={"strategy": "tokens", "chunk_size": 5})
    for hook in (manager.post_model_build, manager.pre_lora_load, manager.post_lora_load):
        hook(keys, model)
        assert torch.is_tensor(model(input_ids=ids, labels=labels).logits)
    manager.post_model_load(keys, model)
    output = model(input_ids=ids, labels=labels)
    assert not torch.is_tensor(output.logits)
    output.loss.backward()
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close([p.grad for p in model.parameters()], gradients)


def test_the_trainer_is_told_of_tokens_if_asked(manager):
    class Trainer:
        model_accepts_loss_kwargs = False

    for keys in (config(), config(compiled_loss_token_mean=False), config(compiled_loss_token_mean=True)):
        trainer = Trainer()
        manager.post_trainer_create(keys, trainer)
        assert trainer.model_accepts_loss_kwargs is bool(keys.compiled_loss_token_mean)


def args(manager, **keys):
    """The YAML's keys, as the class that the plugin names validates them."""
    (name,) = manager.get_input_args()
    module, _, cls = name.rpartition(".")
    return getattr(importlib.import_module(module), cls)(**keys)


def test_keys(manager):
    assert args(manager).model_dump() == {"compiled_loss_chunking": None, "compiled_loss_token_mean": False}
    chunking = {"memory_budget": "1GiB"}
    assert args(manager, compiled_loss_chunking=chunking, rl=None).compiled_loss_chunking == chunking
    chunking = {"accumulate_dtype": "float32"}  # which YAML has as text
    assert args(manager, compiled_loss_chunking=chunking).compiled_loss_chunking == chunking


@pytest.mark.parametrize(
    ("key", "value"),
    [("rl", "dpo"), ("cut_cross_entropy", True), ("flash_attn_cross_entropy", True), ("use_eaft", True)],
)
def test_other_losses_are_refused(manager, key, value):
    with pytest.raises(ValueError, match=f"{key}: expected none beside CompiledLossPlugin, .* got {value!r}: remove"):
        args(manager, **{key: value})


def test_wrong_keys_are_refused(manager):
    with pytest.raises(
        TypeError, match=r"^Chunking: expected only .*, got memory_budgt: did you mean memory_budget\?$"
    ):
        args(manager, compiled_loss_chunking={"memory_budgt": "1GiB"})
    with pytest.raises(
        TypeError, match=r"^compiled_loss_chunking: expected a mapping of Chunking's fields, .* got 'auto'"
    ):
        args(manager, compiled_loss_chunking="auto")
    with pytest.raises(
        TypeError, match=r"^CompiledLossPlugin: expected only .*: did you mean compiled_loss_token_mean"
    ):
        args(manager, compiled_loss_token_maen=True)
    with pytest.raises(ValueError, match="token_mean"):
        args(manager, compiled_loss_token_mean="maybe")


# Axolotl's own training ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_training(tmp_path):
    """Its losses and its head with and without the plugin, which differ by rounding: fp32, four steps of SGD.

    A loss near 4 has a spacing of 2^-21.
    """
    for package in ("axolotl", "bitsandbytes", "datasets", "evaluate", "fastcore", "numba", "opentelemetry", "posthog"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"Axolotl's training needs {package}")
    plugin = {"plugins": [NAME]}
    runs = [{}, plugin, {**plugin, "compiled_loss_token_mean": True}, {**plugin, "use_eaft": True}]
    child = ROOT / "tests" / "support" / "axolotl_child.py"
    process = subprocess.run(
        [sys.executable, str(child), str(tmp_path), json.dumps(runs)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        timeout=500,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    alone, fused, tokens, refused = json.loads(process.stdout.splitlines()[-1])
    assert not alone["fused"] and fused["fused"] and tokens["fused"]
    assert len(alone["losses"]) == 4
    torch.testing.assert_close(fused["losses"], alone["losses"], rtol=0.0, atol=8 * 2**-21)
    torch.testing.assert_close(torch.tensor(fused["weight"]), torch.tensor(alone["weight"]), rtol=1e-5, atol=1e-6)
    difference = torch.tensor(tokens["weight"]) - torch.tensor(alone["weight"])
    assert difference.norm() > 1e-3  # Axolotl's own mean is another
    assert "use_eaft: expected none beside CompiledLossPlugin" in refused["refused"]
