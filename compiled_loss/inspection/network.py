"""The network model: a collective, the links between GPUs, and about the least time that it takes on them.

NOTE [Network model]
n ranks are on m nodes, p = n / m on each. S is the whole size of what is reduced or gathered. Whatever the algorithm,
each rank sends at least what it sends in a ring:

    all-reduce                        2 (n - 1) / n S
    all-gather, reduce-scatter          (n - 1) / n S

The rate is that of one GPU in one direction. On one node it is NVLink's. Between nodes it is that of the network cards,
one per GPU: rings through all p GPUs of a node use p cards, but no more than NVLink brings to them. To the time of
sending, the model adds a constant per call, and a latency for each step that waits for the step before. An all-reduce
is a chain in each node and a tree between nodes, there and back; the other collectives are a ring:

    all-reduce                        2 (p - 1) steps within nodes, 2 log2(m) across, rounded up
    all-gather, reduce-scatter          m (p - 1) steps within nodes,  m - 1    across

NCCL's own choice between algorithms (src/graph/tuning.cc) weighs such sums. The model leaves out reductions in a switch
(NVLS, SHARP), which send half as much, congestion, the overhead of protocols, and waiting for a rank that is late.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Link:
    """The bytes per second of one GPU in one direction, and the seconds that a step of a small collective waits for."""

    bytes_per_second: float
    step_seconds: float
    source: str


@dataclass(frozen=True, kw_only=True)
class Network:
    """The links of GPUs of one kind, `within` a node of `node` GPUs and `across` nodes; a call takes `call_seconds`."""

    node: int
    within: Link
    across: Link
    call_seconds: float


# Rates are from data sheets. Latencies are assumed: those that NCCL 2.28.7 expects of its low-latency tree
# (src/graph/tuning.cc: 6.8 us a call, 0.6 us a step over NVLink, 5.0 us a step over a network).
_CALL, _STEP_WITHIN, _STEP_ACROSS = 6.8e-6, 0.6e-6, 5.0e-6


def _network(nvlink: float, infiniband: float, sources: tuple[str, str]) -> Network:
    """Returns a network with eight GPUs per node, as in DGX and HGX.

    Data sheets give NVLink in both directions together, and cards in bits.
    """
    return Network(
        node=8,
        within=Link(bytes_per_second=nvlink / 2, step_seconds=_STEP_WITHIN, source=sources[0]),
        across=Link(bytes_per_second=infiniband / 8, step_seconds=_STEP_ACROSS, source=sources[1]),
        call_seconds=_CALL,
    )


NETWORKS = {
    "cuda:sm_80": _network(
        600e9,
        200e9,
        ("NVIDIA A100 data sheet (2021), SXM: NVLink 600 GB/s", "NVIDIA DGX A100 data sheet: HDR InfiniBand 200 Gb/s"),
    ),
    "cuda:sm_90": _network(
        900e9,
        400e9,
        ("NVIDIA H100 data sheet, SXM: NVLink 900 GB/s", "NVIDIA DGX H100 data sheet: NDR InfiniBand 400 Gb/s"),
    ),
    "cuda:sm_100": _network(
        1800e9,
        400e9,
        ("NVIDIA HGX B200 data sheet: NVLink 1.8 TB/s", "NVIDIA DGX B200 data sheet: NDR InfiniBand 400 Gb/s"),
    ),
}
"""Links of GPUs by the target of their code; `source` says where each rate is from. H200 has those of H100."""

_TIMES_SENT = {"all-reduce": 2, "all-gather": 1, "reduce-scatter": 1}


@dataclass(frozen=True, kw_only=True)
class Collective:
    """One collective of a rank: "all-reduce", "all-gather", "reduce-scatter" or an operator's own name.

    `size` is the bytes of the whole: the result of an all-gather, the input of a reduce-scatter. `ranks` is the number
    of ranks that take part.
    """

    kind: str
    size: int
    ranks: int

    @property
    def sent_bytes(self) -> float | None:
        """The least bytes that this rank sends: NOTE [Network model]; None for a kind that the model does not have."""
        times = _TIMES_SENT.get(self.kind)
        return None if times is None else times * self.size * (self.ranks - 1) / self.ranks

    def seconds(self, network: Network, nodes: int | None = None) -> float | None:
        """Returns about the least seconds it takes, on `nodes` or as few as hold the ranks: NOTE [Network model]."""
        nodes = -(-self.ranks // network.node) if nodes is None else nodes
        sent, each = self.sent_bytes, -(-self.ranks // nodes)
        if sent is None:
            return None
        rate, across = network.within.bytes_per_second, nodes - 1
        if nodes > 1:
            rate = min(rate, each * network.across.bytes_per_second)
        within = self.ranks - nodes
        if self.kind == "all-reduce":
            within, across = 2 * (each - 1), 2 * (nodes - 1).bit_length()
        waited = within * network.within.step_seconds + across * network.across.step_seconds
        return network.call_seconds + waited + sent / rate
