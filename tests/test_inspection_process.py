"""The inspector in the state that users' processes are in, and what it says where it cannot work."""

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from functools import partial
from pathlib import Path

import inspected_functions as user
import pytest
import torch
import torch.nn.functional as F
from inspecting import inspect, line

import compiled_loss
from compiled_loss.inspection import TARGETS, InspectionError, process

H100 = TARGETS["cuda:sm_90"]


pytestmark = [
    pytest.mark.xdist_group("inspection"),  # one worker holds the children
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="GPU CODE IS NOT TESTED: it is generated on Linux"),
]


# The caller's process -----------------------------------------------------------------------------------------------

MARK = "COMPILED_LOSS_TEST_MARK"

CALLER = """
import json, os, signal, sys, threading
import torch
from compiled_loss.inspection import inspect, process
from compiled_loss.inspection.targets import TARGETS

def state():
    native = {n: id(getattr(torch._C, n)) for n in dir(torch._C) if "cuda" in n.lower()}
    cuda = {n: id(v) for n, v in vars(torch.cuda).items() if callable(v)}
    return {"native": native, "cuda": cuda, "versions": [torch.version.hip, torch.version.cuda],
            "available": [torch.cuda.is_available(), torch.cuda.device_count(), torch.cuda.is_initialized()],
            "threads": [len(os.listdir("/proc/self/task")), threading.active_count(), torch.get_num_threads()],
            "modes": [torch.get_default_dtype(), torch.is_grad_enabled(), torch.random.get_rng_state().tolist()],
            "path": [list(sys.path), os.getcwd(), dict(os.environ)],
            "signals": [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGCHLD, signal.SIGPIPE)],
            "compiler": [m for m in ("torch._inductor.async_compile", "torch._inductor.graph") if m in sys.modules]}

def local(x):  # of __main__: it travels by value
    return x.exp()

def ask():
    return inspect(local, "f32[64,64]:grad", assemble=False).launches

def say(**values):
    print(json.dumps(values), flush=True)
"""

CLEAN = """
before = state()
launches = ask()
after = state()
say(launches=launches, changed={k: [str(v)[:999], str(after[k])[:999]] for k, v in before.items() if v != after[k]})
os.kill(os.getpid(), signal.SIGKILL)
"""

FORK = """
first = ask()
gpu = process.child_for(TARGETS["cuda:sm_90"])
reading, writing = os.pipe()
pid = os.fork()
if pid == 0:
    forked = ask()
    own = process.child_for(TARGETS["cuda:sm_90"])._process.pid
    os.write(writing, json.dumps([forked, own, own != gpu._process.pid]).encode())
    sys.exit(0)  # with what atexit calls
status = os.waitpid(pid, 0)[1]
forked, grandchild, own = json.loads(os.read(reading, 1000))
say(launches=[first, forked, ask()], own=own, status=status, grandchild=os.path.exists(f"/proc/{grandchild}"),
    same=gpu is process.child_for(TARGETS["cuda:sm_90"]) and gpu.alive)
"""


def alive(mark):
    """Processes with the mark in their environment."""
    found = []
    for environment in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"{MARK}={mark}".encode() in environment.read_bytes():
                found.append(int(environment.parent.name))
        except OSError:  # gone, or another user's
            continue
    return found


def gone(mark, seconds=15):
    for _ in range(10 * seconds):
        if not alive(mark):
            return True
        time.sleep(0.1)
    return False


def run_script(folder, text):
    """What a user's script says, its exit status, and whether nothing of it is left."""
    mark = uuid.uuid4().hex
    script = folder / "script.py"
    script.write_text(CALLER + text)
    path = os.pathsep.join([str(Path(compiled_loss.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script)],
        env={**os.environ, MARK: mark, "PYTHONPATH": path},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.stdout, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.returncode, gone(mark)


def test_the_caller_stays_as_it_was(tmp_path):
    """And when it is killed its child ends."""
    said, status, nothing_left = run_script(tmp_path, CLEAN)
    assert said == {"launches": 2, "changed": {}}
    assert status == -signal.SIGKILL and nothing_left


@pytest.mark.slow
def test_a_fork_has_a_child_of_its_own(tmp_path):
    said, status, nothing_left = run_script(tmp_path, FORK)
    assert said == {"launches": [2] * 3, "own": True, "status": 0, "grandchild": False, "same": True}
    assert status == 0 and nothing_left


def test_one_child_serves_functions_of_any_module():
    pids = set()
    for fn in (user.twice, torch.exp, lambda x: x + 1, F.relu, user.same_shape):
        inspect(fn, "f32[8]", backward=False)
        pids.add(process.child_for(H100)._process.pid)
    assert len(pids) == 1


def test_two_threads_share_a_child():
    inspect(user.twice, "f32[8]", backward=False)
    pid = process.child_for(H100)._process.pid
    found = {}

    def work(columns):
        found[columns] = inspect(user.same_shape, f"f32[8,{columns}]:grad")

    threads = [threading.Thread(target=work, args=(columns,)) for columns in (100, 200, 300)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {columns: i.forward.peak_bytes for columns, i in found.items()} == {n: 8 * n * 4 for n in (100, 200, 300)}
    assert process.child_for(H100)._process.pid == pid


def test_two_threads_start_one_child(monkeypatch):
    started = []

    class Slow:
        alive = True

        def __init__(self, target):
            started.append(target)
            time.sleep(0.2)

    monkeypatch.setattr(process, "_children", {})
    monkeypatch.setattr(process, "Child", Slow)
    threads = [threading.Thread(target=process.child_for, args=(H100,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert started == [H100]


def test_a_child_that_is_killed():
    call_ = partial(inspect, torch.mm, "f32[4,4]", "f32[4,4]", device="cpu", backward=False)
    call_()
    first = process.child_for(None)

    def kill(text):
        os.kill(process.child_for(None)._process.pid, signal.SIGKILL)
        first._process.wait()

    with pytest.raises(InspectionError, match="ended with status -9"):
        call_(progress=kill)
    assert not first.alive
    assert call_().operations == 2 * 4**3
    assert process.child_for(None) is not first


@pytest.mark.slow
def test_a_child_that_is_killed_while_it_waits(monkeypatch):
    monkeypatch.setattr(process, "_children", {})
    first = process.child_for(None)
    first._process.kill()
    first._process.wait()
    second = process.child_for(None)
    assert second is not first and second.alive
    second.close()
    assert not second.alive


def test_a_child_that_is_closed_leaves_no_file(monkeypatch):
    before = os.listdir("/proc/self/fd")
    child = process.Child(None)
    child.close()
    assert os.listdir("/proc/self/fd") == before


def test_a_child_that_just_ended(monkeypatch):
    child = process.Child(None)
    child._process.kill()
    child._process.wait()
    with pytest.raises(InspectionError, match="ended with status -9"):
        child.ask("properties", None, "f")


@pytest.mark.slow
def test_an_exception_of_progress_is_the_callers():
    class StopError(Exception): ...

    def stop(text):
        raise StopError

    with pytest.raises(StopError):
        inspect(torch.mm, "f32[4,4]", "f32[4,4]", device="cpu", backward=False, progress=stop)
    assert inspect(torch.mm, "f32[4,4]", "f32[4,8]", device="cpu", backward=False).operations == 2 * 4 * 4 * 8


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module of the user's that appears on sys.path now, and imports it, again where it was imported."""
    name = f"user_module_{uuid.uuid4().hex[:8]}"
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def write(text):
        (tmp_path / f"{name}.py").write_text(text)
        importlib.invalidate_caches()
        return importlib.reload(sys.modules[name]) if name in sys.modules else importlib.import_module(name)

    yield write
    sys.modules.pop(name, None)


def test_a_module_that_came_on_the_path_later(module):
    inspect(user.twice, "f32[8]", backward=False)  # the child is there
    later = module("def fn(x):\n    return x.exp()\n")
    assert inspect(later.fn, "f32[8]", backward=False).launches == 1


@pytest.mark.slow
def test_a_module_that_was_edited(module, monkeypatch):
    monkeypatch.setattr(process, "_children", {})  # a child that knows the path
    try:
        edited = module("def fn(x):\n    return x @ x\n")
        assert inspect(edited.fn, "f32[8,8]", backward=False, device="cpu").operations == 2 * 8**3
        edited = module("def fn(x):\n    return x @ x @ x\n")
        assert inspect(edited.fn, "f32[8,8]", backward=False, device="cpu").operations == 2 * 2 * 8**3
    finally:
        process.child_for(None).close()


# One clear error each -----------------------------------------------------------------------------------------------


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


def test_a_function_that_cannot_travel():
    lock = threading.Lock()
    expected = r"^<lambda>: expected a function that can be sent to another process, got .*lock.*: define it at the top"
    with pytest.raises(InspectionError, match=expected) as caught:
        inspect(lambda x: x * 2 if lock else x, "f32[8]")
    clear(str(caught.value), lines=1)


def test_an_input_that_is_more_than_its_shape():
    class Mine(torch.Tensor): ...

    with pytest.raises(InspectionError, match=r"^inputs: expected plain tensors and parameters, got a Mine"):
        inspect(user.twice, torch.ones(3).as_subclass(Mine))


def test_a_function_that_is_compiled_already():
    compiled = torch.compile(lambda x: x.exp())
    assert inspect(compiled, "f32[8]", backward=False).launches == 1


@pytest.mark.parametrize("device", ["cuda:sm_42", "gpu", "", "hip", "cuda:0"])
def test_an_unknown_device(device):
    with pytest.raises(InspectionError, match=r"^device: expected one of cpu, cuda, cuda:sm_80, .*, got ") as caught:
        inspect(user.twice, "f32[8]", device=device)
    assert repr(device) in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_real_gpu_where_there_is_none():
    with pytest.raises(InspectionError, match=r"^device: expected a GPU .*'cuda:sm_90'") as caught:
        inspect(user.twice, "f32[8]", device="cuda")
    clear(str(caught.value), lines=1)


def test_an_input_that_is_no_spec():
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
