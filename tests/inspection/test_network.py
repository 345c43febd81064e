"""The model of time on a network, by hand, and its table of rates."""

import re

import pytest

from compiled_loss.inspection.network import NETWORKS, Collective, Link, Network
from compiled_loss.inspection.targets import GPUS, TARGETS

SLOW = Network(
    node=8,
    within=Link(bytes_per_second=100, step_seconds=1, source=""),
    across=Link(bytes_per_second=10, step_seconds=10, source=""),
    call_seconds=1000,
)


@pytest.mark.parametrize(
    ("kind", "ranks", "sent"),
    [
        ("all-reduce", 4, 1500),
        ("all-gather", 4, 750),
        ("reduce-scatter", 4, 750),
        ("all-reduce", 1, 0),
        ("broadcast", 4, None),
    ],
)
def test_bytes_sent(kind, ranks, sent):
    assert Collective(kind=kind, size=1000, ranks=ranks).sent_bytes == sent


@pytest.mark.parametrize(
    ("kind", "ranks", "nodes", "seconds"),
    [
        ("all-reduce", 1, None, 1000),
        ("all-reduce", 8, None, 1000 + 14 + 1400 / 100),
        ("all-reduce", 8, 8, 1000 + 2 * 3 * 10 + 1400 / 10),
        ("all-reduce", 16, None, 1000 + 14 + 2 * 10 + 1500 / 80),  # eight cards a node
        ("all-reduce", 40, None, 1000 + 14 + 2 * 3 * 10 + 1560 / 80),  # a tree of five nodes has three levels
        ("all-reduce", 16, 16, 1000 + 2 * 4 * 10 + 1500 / 10),
        ("all-gather", 8, None, 1000 + 7 + 700 / 100),
        ("all-gather", 16, None, 1000 + 2 * 7 + 10 + 750 / 80),
        ("reduce-scatter", 16, 16, 1000 + 15 * 10 + 750 / 10),
        ("broadcast", 8, None, None),
    ],
)
def test_hand_computed_seconds_of_collectives(kind, ranks, nodes, seconds):
    found = Collective(kind=kind, size=800, ranks=ranks).seconds(SLOW, nodes)
    assert found == (None if seconds is None else pytest.approx(seconds, rel=1e-12))


def test_many_cards_bring_no_more_than_nvlink():
    fast = Network(
        node=8, within=SLOW.within, across=Link(bytes_per_second=90, step_seconds=10, source=""), call_seconds=0
    )
    assert Collective(kind="all-reduce", size=800, ranks=16).seconds(fast) == pytest.approx(34 + 1500 / 100)


def rate(source):
    """Bytes or bits a second that a source names."""
    number, prefix = re.search(r"([\d.]+) ([GT])[Bb]/s", source).groups()
    return float(number) * {"G": 1e9, "T": 1e12}[prefix]


@pytest.mark.parametrize("target", NETWORKS)
def test_rates_are_those_of_their_sources(target):
    """NVLink's are of both directions together, in bytes; network cards' of one, in bits."""
    network = NETWORKS[target]
    assert target in TARGETS
    assert network.within.bytes_per_second == rate(network.within.source) / 2
    assert network.across.bytes_per_second == rate(network.across.source) / 8
    first = next(name for name, gpu in GPUS.items() if gpu.target == target)
    assert first in network.within.source and first in network.across.source
    assert 0 < network.within.step_seconds < network.across.step_seconds < network.call_seconds < 1e-5
