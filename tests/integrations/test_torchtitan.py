"""Our loss in torchtitan's own Trainer: the losses and gradient norms of every step are those with its own.

torchtitan is imported in the ranks' processes alone, for it takes seconds.
"""

import importlib.util
import json

import pytest
import ranks
import torch
import torch.distributed as dist
from comparing import assert_matches

from compiled_loss import Chunking, linear_cross_entropy

if importlib.util.find_spec("torchtitan") is None or importlib.util.find_spec("spmd_types") is None:
    pytest.skip("torchtitan is not installed", allow_module_level=True)
if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 13):
    pytest.skip("torchtitan 0.3.0 asks for a newer torch", allow_module_level=True)

# Each value is a mean or a norm of sums in fp32, which are rounded once a chunk, a rank and a step.
ROUNDINGS = 16 * torch.finfo(torch.float32).eps
NEWEST = pytest.mark.skipif(not hasattr(dist, "set_timeout"), reason="torchtitan 0.3.0 asks for a newer torch here")


def trained(ours, settings):
    """The steps and validations of one training, with torchtitan's loss or ours."""
    import torchtitan_training as titan

    from compiled_loss.integrations.torchtitan import LinearCrossEntropyLoss

    return titan.trained(LinearCrossEntropyLoss.Config() if ours else titan.own_loss(), settings)


def assert_same(own, ours):
    assert own[0].shape == (4, 2)
    assert own[0][0, 0] > own[0][-1, 0], "it learns"
    for expected, found in zip(own, ours, strict=True):
        torch.testing.assert_close(found, expected, rtol=ROUNDINGS, atol=0)


# One rank ------------------------------------------------------------------------------------------------------------


def training():
    settings = {"training.global_batch_size": 4, "validator.enable": True, "spmd_backend": "partial_dtensor"}
    own, ours = (trained(kind, settings) for kind in (False, True))
    assert own[1].shape == (3,)
    assert_same(own, ours)


def made(head, **options):
    from compiled_loss.integrations.torchtitan import LinearCrossEntropyLoss

    loss = LinearCrossEntropyLoss.Config(**options).build(compile_config=None)
    loss.set_lm_head(head)
    return loss


def assert_own_loss(head):
    """Loss and gradients are those of torchtitan's loss of the head's logits."""
    from torchtitan.components.loss import CrossEntropyLoss

    own, count = CrossEntropyLoss.Config().build(), torch.tensor(5)
    hidden, labels = torch.randn(2, 6, 8, requires_grad=True), torch.randint(0, 11, (2, 6))
    labels[0, :3] = -100
    assert_matches(
        lambda states: made(head)(states, labels, count, positions=labels)[0],
        lambda states: own(head(states), labels, count)[0],
        [hidden],
        [hidden, *head.parameters()],
    )
    with torch.no_grad():
        torch.testing.assert_close(made(head)(hidden, labels), own(head(hidden), labels))


def plain_head():
    assert_own_loss(torch.nn.Linear(8, 11))


def muse_glimmer_head():
    from torchtitan.models.muse_glimmer.model import SoftCappedLinear

    for temperature in (2.0, None):
        config = SoftCappedLinear.Config(
            in_features=8, out_features=11, output_multiplier=3.0, output_soft_cap_temp=temperature
        )
        assert_own_loss(config.build())


def config():
    from torchtitan.components.loss import BaseLoss

    loss = made(torch.nn.Linear(8, 11), chunking=Chunking(chunk_size=3), z_loss=0.5, label_smoothing=0.1)
    assert isinstance(loss.config, BaseLoss.Config)
    json.dumps(loss.config.to_dict())
    hidden, labels = torch.randn(2, 6, 8), torch.randint(0, 11, (2, 6))
    expected = linear_cross_entropy(
        hidden, loss.lm_head.weight, labels, bias=loss.lm_head.bias, reduction="sum", z_loss=0.5, label_smoothing=0.1
    )
    torch.testing.assert_close(loss(hidden, labels)[0], expected)


def refusals():
    class Doubled(torch.nn.Linear):
        def forward(self, states):
            return 2 * super().forward(states)

    hidden, labels = torch.randn(2, 6, 8), torch.randint(0, 11, (2, 6))
    with pytest.raises(TypeError, match=r"lm_head: expected a head that is its weight .*Doubled, which has a forward"):
        made(Doubled(8, 11))(hidden, labels)
    with pytest.raises(ValueError, match="lm_head: expected the model's head before the first call"):
        made(None)(hidden, labels)
    with pytest.raises(TypeError, match="advantages"):
        made(torch.nn.Linear(8, 11))(hidden, labels, advantages=hidden)


ONE_RANK = (training, plain_head, muse_glimmer_head, config, refusals)


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    (failures,) = ranks.run(ranks.failures_of, 1, tmp_path_factory.mktemp("torchtitan"), *ONE_RANK, limit=400)
    return failures


@pytest.mark.parametrize("test", [test.__name__ for test in ONE_RANK])
def test_one_rank(failures, test):
    assert test not in failures, failures[test]


# Several ranks -------------------------------------------------------------------------------------------------------

RANKS = {
    "FSDP2, validation, two accumulated": (
        2,
        {"data_parallel_shard_degree": 2, "training.global_batch_size": 8, "validator.enable": True},
    ),
    "sharded head, partial_dtensor": (2, {"tensor_parallel_degree": 2, "spmd_backend": "partial_dtensor"}),
    "sharded head, full_dtensor": (2, {"tensor_parallel_degree": 2, "spmd_backend": "full_dtensor"}),
    "context": (2, {"context_parallel_degree": 2, "training.seq_len": 512}),
    "compiled": (
        2,
        {"data_parallel_shard_degree": 2, "compile.enable": True, "compile.components": ["loss"]},
    ),
    "tied weights": (2, {"data_parallel_shard_degree": 2, "model_spec.model.enable_weight_tying": True}),
}
NEWEST_RANKS = {
    "FSDP2 and a sharded head": (4, {"data_parallel_shard_degree": 2, "tensor_parallel_degree": 2}),
    "sharded head, compiled model and loss": (2, {"tensor_parallel_degree": 2, "compile.enable": True}),
    "sharded head, no sequence parallelism, types checked": (
        2,
        {
            "tensor_parallel_degree": 2,
            "enable_sequence_parallel": False,
            "debug.spmd_typechecking": True,
            "activation_checkpoint": None,
        },
    ),
    "pipeline, validation": (
        2,
        {
            "pipeline_parallel_degree": 2,
            "pipeline_parallel_schedule": "Interleaved1F1B",
            "training.local_batch_size": 4,
            "validator.enable": True,
        },
    ),
}
CASES = [pytest.param(*case, id=name) for name, case in RANKS.items()]
CASES += [pytest.param(*case, id=name, marks=NEWEST) for name, case in NEWEST_RANKS.items()]


@pytest.mark.slow
@pytest.mark.parametrize(("world", "settings"), CASES)
def test_ranks(world, settings, tmp_path):
    found = []
    for kind in (False, True):  # by processes of their own: the meshes of a second Trainer are not its first's
        folder = tmp_path / str(kind)
        folder.mkdir()
        found.append(ranks.run(trained, world, folder, kind, settings, limit=400))
    seen = slice(1 if "pipeline_parallel_degree" in settings else 0, None)  # the last stage sees the loss
    for own, ours in zip(*(each[seen] for each in found), strict=True):
        assert_same(own, ours)
