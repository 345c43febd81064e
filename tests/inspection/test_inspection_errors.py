"""What the inspector says where it cannot work: one clear error each."""

import re
import sys
import threading
from pathlib import Path

import inspected_functions as user
import pytest
import torch
from inspecting import inspect, line

from compiled_loss.inspection import InspectionError, process

pytestmark = [
    pytest.mark.xdist_group("inspection"),  # one worker holds the children
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="GPU CODE IS NOT TESTED: it is generated on Linux"),
]


def clear(text, *, lines=20):
    """Neither compiler's frames nor a wall of text."""
    frames = re.findall(r'File "(.+?)"', text)
    assert not [f for f in frames if "/torch/" in f or "compiled_loss" in Path(f).parts], text
    assert len(text.splitlines()) <= lines, text


@pytest.mark.parametrize(
    ("name", "inputs", "says"),
    [("raises", ["f32[8,4]:grad"], "mine, 2"), ("does_not_fit", ["f32[8,4]:grad", "f32[5,4]"], "8, 4.*5, 4")],
)
def test_a_function_that_raises(name, inputs, says):
    with pytest.raises(InspectionError, match=rf"(?s)^{name} raised while it was inspected:\n.*{says}") as caught:
        inspect(getattr(user, name), *inputs)
    text = str(caught.value)
    assert re.search(rf'inspected_functions\.py", line {line(name).split(":")[1]}\b', text)
    clear(text)
    assert inspect(user.twice, "f32[8]", backward=False).launches == 1  # the child serves on


def test_a_function_that_ends_the_process():
    with pytest.raises(InspectionError, match=r"(?s)ended with status 7 .*last words"):
        inspect(user.ends, "f32[8]", backward=False, device="cpu")


@pytest.mark.slow
def test_a_function_that_exits():
    with pytest.raises(InspectionError, match=r"(?s)^exits raised .*SystemExit: 3"):
        inspect(user.exits, "f32[8]", backward=False, device="cpu")


@pytest.mark.parametrize("fn", [user.same_shape, lambda x: None])
def test_nothing_to_differentiate(fn):
    with pytest.raises(InspectionError, match=rf"^{fn.__name__}: expected a result that requires grad") as caught:
        inspect(fn, "f32[8]")
    clear(str(caught.value), lines=1)


def test_loop_that_depends_on_data():
    with pytest.raises(
        InspectionError, match=r"^the host asked for data 10001 times: expected a program whose loops"
    ) as e:
        inspect(user.until, "f32[8]", backward=False)
    clear(str(e.value), lines=1)


def test_unpicklable_function():
    lock = threading.Lock()
    expected = r"^<lambda>: expected a function that can be sent to another process, got .*lock.*: define it at the top"
    with pytest.raises(InspectionError, match=expected) as caught:
        inspect(lambda x: x * 2 if lock else x, "f32[8]")
    clear(str(caught.value), lines=1)


def test_tensor_subclass_input():
    class Mine(torch.Tensor): ...

    with pytest.raises(InspectionError, match=r"^inputs: expected plain tensors and parameters, got a Mine"):
        inspect(user.twice, torch.ones(3).as_subclass(Mine))


def test_compiled_function_is_taken():
    compiled = torch.compile(lambda x: x.exp())
    assert inspect(compiled, "f32[8]", backward=False).launches == 1


@pytest.mark.parametrize("device", ["cuda:sm_42", "gpu", "", "hip", "cuda:0"])
def test_an_unknown_device(device):
    with pytest.raises(InspectionError, match=r"^device: expected one of cpu, cuda, cuda:sm_80, .*, got ") as caught:
        inspect(user.twice, "f32[8]", device=device)
    assert repr(device) in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_device_without_a_gpu():
    with pytest.raises(InspectionError, match=r"^device: expected a GPU .*'cuda:sm_90'") as caught:
        inspect(user.twice, "f32[8]", device="cuda")
    clear(str(caught.value), lines=1)


def test_invalid_input_text():
    with pytest.raises(ValueError, match=r"^inputs: expected dtype\[size,size\].*, got 'mean'"):
        inspect(user.twice, "mean")


@pytest.fixture
def afresh(monkeypatch, tmp_path):
    """No children, and nothing compiled before."""
    monkeypatch.setattr(process, "_children", {})
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    yield
    process._close_all()  # of this test


def refused(pattern, device="cuda:sm_90", **options):
    with pytest.raises(InspectionError, match=pattern) as caught:
        inspect(user.twice, "f32[8]", backward=False, device=device, **options)
    clear(str(caught.value))


def test_without_a_compiler(afresh, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    refused(r"^a C\+\+ compiler: expected g\+\+ or clang\+\+ on PATH, found none: install g\+\+, or set CXX$")
    monkeypatch.setenv("CXX", "no-such-compiler")
    refused(r"^a C\+\+ compiler: expected CXX=no-such-compiler, g\+\+ or clang\+\+ on PATH")


def test_with_a_compiler_that_fails(afresh, monkeypatch, tmp_path):
    compiler = tmp_path / "broken-compiler"
    compiler.write_text("#!/bin/sh\necho my own trouble >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    refused(rf"(?s)^the fake device does not compile with {compiler} against torch .*:\nmy own trouble")
    assert not list((tmp_path / "cache").rglob("*.so"))


@pytest.mark.slow
def test_the_shim_is_compiled_once(afresh, monkeypatch, tmp_path):
    from compiled_loss.inspection import fake_device

    library = fake_device.build()
    monkeypatch.setenv("PATH", str(tmp_path))  # no compiler from here on
    assert fake_device.build() == library
    assert [path.name for path in library.parent.iterdir()] == [library.name]


@pytest.mark.slow
def test_the_cpu_without_a_compiler(afresh, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    refused(r"(?s)C\+\+ compiler", device="cpu")


def test_on_another_platform(afresh, monkeypatch):
    for platform in ("darwin", "win32"):
        monkeypatch.setattr(sys, "platform", platform)
        refused(rf"{platform}.*")


def test_without_cloudpickle(monkeypatch):
    monkeypatch.setitem(sys.modules, "cloudpickle", None)
    refused(r"^inspection needs cloudpickle: pip install 'compiled-loss\[inspect\]'$")


def test_without_triton(afresh, monkeypatch, tmp_path):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("raise ImportError('no triton here')\n")
    monkeypatch.syspath_prepend(tmp_path)
    refused(r"^inspection needs triton: pip install 'compiled-loss\[inspect\]'$")


def test_without_an_interpreter(afresh, monkeypatch):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    refused(r"/nowhere/python")


def test_with_a_cache_that_cannot_be_written(afresh, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file"))
    refused(r"cache")
