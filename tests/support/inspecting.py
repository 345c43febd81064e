"""Inspections as the tests of the inspector want them."""

import inspect as source_of
import re
import struct
from dataclasses import replace

import inspected_functions as user
import torch

from compiled_loss.inspection import Inspection, inspector

MIB = 2**20
N, H, V = 64, 32, 1000
HIDDEN, WEIGHT = f"f32[{N},{H}]", f"f32[{V},{H}]"


def inspect(fn, *inputs, device="cuda:sm_90", assemble=False, measure=False, **options):
    """Without what takes long, and with what must be true of every inspection."""
    found = inspector.inspect(fn, *inputs, device=device, assemble=assemble, measure=measure, **options)
    for p in found.passes:
        assert all(launch.live_bytes >= 0 and launch.written_bytes >= 0 for launch in p.launches)
        assert max((launch.live_bytes for launch in p.launches), default=0) == p.peak_bytes
        assert sum(p.kernels.values()) == len(p.launches)
    assert {k.name for k in found.kernels} == {launch.kernel for p in found.passes for launch in p.launches}
    assert (found.device, found.torch) == (device, torch.__version__)
    assert Inspection.from_json(found.to_json()) == found
    return found


def alike(one, other):
    """But for the time and for how many graphs the process has seen."""
    graphs = [[re.sub(r"(?<=AOT ID: \[').*(?='\])", "", g.wrapper) for g in i.graphs] for i in (one, other)]
    return graphs[0] == graphs[1] and replace(one, graphs=other.graphs, seconds=other.seconds) == other


def kinds(p):
    return [launch.kind for launch in p.launches]


def names(p):
    return [re.sub("^aten::", "", launch.kernel) for launch in p.launches]


def line(mark):
    """Where a function is marked."""
    lines = source_of.getsource(user).splitlines()
    (number,) = [i for i, text in enumerate(lines, 1) if text.endswith(f"# MARK {mark}")]
    return f"inspected_functions.py:{number}"


def png_size(path):
    """Width and height of a picture, whole as it must be."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert data[-8:-4] == b"IEND"
    return struct.unpack(">II", data[16:24])
