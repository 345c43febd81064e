"""The inspector in the state that users' processes are in, and that state after it."""

import importlib
import json
import os
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
from inspecting import inspect

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

BY_VALUE = """
import functools

class Local:
    def __call__(self, x):
        return local(x) * math.pi

import math

say(launches=[inspect(fn, "f32[64,64]:grad", assemble=False).launches
              for fn in (Local(), functools.partial(Local()), functools.partial(lambda x, y: y * local(x), y=2.0))])
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


def test_caller_state_is_unchanged(tmp_path):
    """And when it is killed its child ends."""
    said, status, nothing_left = run_script(tmp_path, CLEAN)
    assert said == {"launches": 2, "changed": {}}
    assert status == -signal.SIGKILL and nothing_left


def test_functions_of_a_script_find_its_variables(tmp_path):
    said, status, _ = run_script(tmp_path, BY_VALUE)
    assert (said, status) == ({"launches": [2, 2, 2]}, 0)


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
