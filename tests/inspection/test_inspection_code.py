"""What is made of kernels: machine code, files, and a real run of the program."""

import sys
from dataclasses import FrozenInstanceError
from functools import partial

import inspected_functions as user
import pytest
import torch
import torch.nn.functional as F
from inspecting import HIDDEN, MIB, WEIGHT, H, N, V, inspect

import compiled_loss
from compiled_loss.inspection import Inspection, InspectionError

pytestmark = [
    pytest.mark.xdist_group("inspection"),  # one worker holds the children
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="GPU CODE IS NOT TESTED: it is generated on Linux"),
]


# Machine code -------------------------------------------------------------------------------------------------------


def check_configurations(found, targets):
    made = [k for k in found.kernels if k.source]
    assert len(made) == 2
    for kernel in made:
        assert kernel.source.count("@triton.jit") == 1
        assert [t for t in targets if not any(c.target == t for c in kernel.configurations)] == []
        assert {c.target for c in kernel.configurations} == set(targets)
        assert all(0 < c.registers <= 512 and c.spills == 0 and c.shared >= 0 for c in kernel.configurations)
        assert all("warps=" in c.options for c in kernel.configurations)
    assert all(k.configurations == () for k in found.kernels if not k.source)
    assert any(c.shared for k in made for c in k.configurations)  # the reduction


def test_assemble_nvidia():
    targets = ("cuda:sm_80", "cuda:sm_90", "cuda:sm_100")
    lines = []
    found = inspect(user.linear_logsumexp, f"{HIDDEN}:grad", f"{WEIGHT}:grad", assemble=targets, progress=lines.append)
    check_configurations(found, targets)
    assert found.kernel("mm").source == "" and found.triton
    assert any("assembling" in text for text in lines) and any("graph" in text for text in lines)
    with pytest.raises(FrozenInstanceError):
        found.name = ""
    default = inspect(user.linear_logsumexp, f"{HIDDEN}:grad", f"{WEIGHT}:grad", assemble=True)
    check_configurations(default, targets[1:2])
    first = inspect(user.linear_logsumexp, f"{HIDDEN}:grad", f"{WEIGHT}:grad", assemble=targets, first_only=True)
    for k, every in zip(first.kernels, found.kernels, strict=True):
        firsts = [next(c for c in every.configurations if c.target == t) for t in targets] if k.source else []
        assert list(k.configurations) == firsts


@pytest.mark.slow
def test_assemble_amd():
    found = inspect(
        user.linear_logsumexp, f"{HIDDEN}:grad", f"{WEIGHT}:grad", device="hip:gfx942", assemble=["hip:gfx942"]
    )
    check_configurations(found, ["hip:gfx942"])
    assert found.roofline_seconds() == found.roofline_seconds("MI300X") > 0
    assert "warp_size=64" in found.kernels[1].source
    assert found.backward.peak_bytes == (N * V + N + V * H + N * H) * 4


@pytest.mark.parametrize(("device", "targets"), [("cuda:sm_90", ["cuda:sm_80", "hip:gfx942"]), ("cpu", ["cuda:sm_80"])])
def test_assemble_for_another_vendor_error(device, targets):
    with pytest.raises(InspectionError, match=rf"^assemble: .* device='{device}'.*{targets[-1]}"):
        inspect(user.twice, "f32[8]", device=device, assemble=targets)
    with pytest.raises(InspectionError, match=r"^device: expected one of .*cuda:sm_90.*, got 'sm_90'"):
        inspect(user.twice, "f32[8]", assemble=["sm_90"])


def test_dump(tmp_path):
    folder = tmp_path / "new" / "dump"
    found = inspect(user.same_shape, "f32[64,1024]:grad", assemble=["cuda:sm_80", "cuda:sm_90"], dump=folder)
    suffixes = [path.suffix for path in folder.rglob("*") if path.is_file()]
    count = sum(len(k.configurations) for k in found.kernels)
    assert suffixes.count(".ptx") == suffixes.count(".cubin") == count > 2
    texts = [path.read_text() for path in folder.rglob("*.py")]
    assert all(k.source in texts for k in found.kernels)
    assert all(g.nodes in texts and g.wrapper in texts for g in found.graphs)
    assert any(".target sm_80" in path.read_text() for path in folder.rglob("*.ptx"))
    assert Inspection.from_json((folder / "report.json").read_text()) == found
    page = (folder / "index.html").read_text()
    assert found.kernels[0].name in page


# A real run ---------------------------------------------------------------------------------------------------------


def check_measured(fn, *inputs, **options):
    found = inspect(fn, *inputs, device="cpu", measure=True, **options)
    assert found.peak_bytes >= 500 * MIB
    assert found.measured.peak_bytes == pytest.approx(found.peak_bytes, rel=0.05)
    assert found.measured.seconds > 0


def test_predicted_peak_matches_measured():
    labels = torch.randint(0, 65536, (2048,))
    check_measured(user.linear_cross_entropy, "f32[2048,32]:grad", "f32[65536,32]:grad", labels)


@pytest.mark.slow
def test_predicted_peak_with_a_large_result():
    check_measured(user.same_shape, "f32[1024,131072]:grad")


@pytest.mark.slow
@pytest.mark.parametrize("backward", [True, False])
def test_predicted_peak_of_layers(backward):
    check_measured(
        lambda a, b, c: user.layers(a, b, c).sum(),
        *["f32[32768,1024]:grad" if backward else "f32[131072,512]"],
        *["f32[1024,1024]:grad" if backward else "f32[512,512]"] * 2,
        backward=backward,
    )


LINEAR = ("f32[512,512]:grad", "f32[262144,512]:grad", "i64[512]:0..262143")
LOGITS = ("f32[2048,65536]:grad", "i64[2048]:0..65535")


@pytest.mark.slow
@pytest.mark.parametrize(
    "fn",
    [
        compiled_loss.cross_entropy,
        partial(compiled_loss.cross_entropy, label_smoothing=0.1),
        partial(compiled_loss.cross_entropy, softcap=30.0, z_loss=1e-4),
        partial(compiled_loss.cross_entropy, reduction="none"),
    ],
    ids=["plain", "smoothing", "softcap", "none"],
)
def test_predicted_peak_of_losses_on_logits(fn):
    check_measured(fn, *LOGITS)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.1, "softcap": 30.0}], ids=["plain", "smoothing, softcap"]
)
@pytest.mark.parametrize("strategy", ["tokens", "vocab"])
def test_predicted_peak_of_linear_losses(strategy, options):
    chunking = compiled_loss.Chunking(strategy=strategy, chunk_size={"tokens": 128, "vocab": 65536}[strategy])
    check_measured(partial(compiled_loss.linear_cross_entropy, chunking=chunking, **options), *LINEAR)


@pytest.mark.slow
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_predicted_peak_of_distillation(divergence):
    check_measured(partial(compiled_loss.distillation, divergence=divergence), LOGITS[0], "f32[2048,65536]", LOGITS[1])
    heads = (*LINEAR[:2], "f32[512,256]", "f32[262144,256]", LINEAR[2])
    chunking = compiled_loss.Chunking(chunk_size=128)
    check_measured(partial(compiled_loss.linear_distillation, divergence=divergence, chunking=chunking), *heads)


@pytest.mark.slow
def test_predicted_peak_of_soft_targets():
    mask = torch.ones(2048, 1, dtype=torch.bool)
    check_measured(compiled_loss.masked_soft_cross_entropy, LOGITS[0], "f32[2048,65536]", mask)


@pytest.mark.slow
def test_measure_with_ignored_labels():
    logits, labels = "f32[8,5]:grad", torch.tensor([-100, 1, 2, 3, 4, 4, 4, -100])
    assert inspect(F.cross_entropy, logits, labels, device="cpu", measure=True).measured.seconds > 0
