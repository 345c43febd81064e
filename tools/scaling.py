"""The tables and the picture of docs/scaling.md, from the committed raw results; tools/figures.py writes them.

N tokens, H width, V vocabulary; R ranks share the vocabulary, D replicas of them share the tokens; G = R D GPUs.
"""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from textwrap import fill
from typing import Any

from compiled_loss.inspection.network import NETWORKS, Collective
from compiled_loss.pictures import BLUE, GOLD, GREEN, GREY, PURPLE, RED, write

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benches" / "results" / "scaling-2.13.0-sm_90.jsonl"
PICTURE = ROOT / "docs" / "scaling.png"
MIB = 2**20
STRATEGIES = ("tokens", "one chunk", "vocab")
# How G GPUs are used: the strategy, and most ranks of the vocabulary; beyond, there are replicas.
STRONG = {
    "ranks, token strategy": ("tokens", 1024),
    "ranks, one chunk": ("one chunk", 1024),
    "ranks, vocab strategy": ("vocab", 1024),
    "8 ranks x replicas": ("tokens", 8),
    "replicas": ("tokens", 1),
}
WEAK = {
    "ranks": ("one chunk", 1024),
    "64 ranks x replicas": ("one chunk", 64),
    "8 ranks x replicas": ("tokens", 8),
    "replicas": ("tokens", 1),
}
COLORS = {
    "ranks, token strategy": BLUE,
    "ranks, one chunk": GREEN,
    "ranks, vocab strategy": PURPLE,
    "ranks": GREEN,
    "64 ranks x replicas": RED,
    "8 ranks x replicas": GOLD,
    "replicas": GREY,
}


class Scaling:
    """Times of a step, of what was read and of the network's model."""

    def __init__(self, lines: list[dict[str, Any]]) -> None:
        self.rows = {(line["strategy"], line["ranks"], line["tokens"]): line for line in lines}
        self.about = lines[-1]
        self.tokens, self.width, self.vocab = (int(size) for size in lines[0]["shape"].split("x"))
        self.gpus = sorted({line["ranks"] for line in lines})
        self.network = NETWORKS["cuda:sm_90"]

    def computed(self, strategy: str, ranks: int, tokens: int) -> float:
        """Seconds of everything but collectives, at the rates of the GPU."""
        return float(self.rows[strategy, ranks, tokens]["seconds"])

    def sent(self, strategy: str, ranks: int, tokens: int) -> float:
        """Seconds of the collectives in the code, on as few nodes as hold the ranks."""
        return sum(count * self._seconds(one) for one, count in self.collectives(strategy, ranks, tokens))

    def collectives(self, strategy: str, ranks: int, tokens: int) -> list[tuple[Collective, int]]:
        read = self.rows[strategy, ranks, tokens]["collectives"]
        return [(Collective(kind=c["kind"], size=c["size"], ranks=c["ranks"]), c["count"]) for c in read]

    def reduced(self, ranks: int, replicas: int) -> float:
        """Seconds of reducing dW, in bf16, over replicas: a node holds as many as it has room for."""
        if replicas == 1:
            return 0.0
        nodes = -(-replicas // max(1, self.network.node // ranks))
        size = 2 * self.vocab // ranks * self.width
        return self._seconds(Collective(kind="all-reduce", size=size, ranks=replicas), nodes)

    def strong(self, strategy: str, ranks: int, replicas: int) -> float:
        """Seconds of a step of N tokens on all GPUs together."""
        shape = strategy, ranks, self.tokens // replicas
        return self.computed(*shape) + self.sent(*shape) + self.reduced(ranks, replicas)

    def weak(self, strategy: str, ranks: int, replicas: int) -> float:
        """Seconds of a step of N tokens for each GPU: R microbatches of N, and dW reduced once."""
        shape = strategy, ranks, self.tokens
        return ranks * (self.computed(*shape) + self.sent(*shape)) + self.reduced(ranks, replicas)

    def _seconds(self, collective: Collective, nodes: int | None = None) -> float:
        found = collective.seconds(self.network, nodes)
        assert found is not None, f"{collective.kind} is not in the model"
        return found

    def curve(self, how: Any, strategy: str, most: int) -> list[float]:
        """`how`, strong or weak, for each number of GPUs."""
        return [how(strategy, min(gpus, most), max(1, gpus // most)) for gpus in self.gpus]


def read() -> Scaling:
    return Scaling([json.loads(line) for line in RESULTS.read_text().splitlines()])


def figures() -> str:
    """The tables, and what they say in words."""
    found = read()
    one = found.strong("tokens", 1, 1)
    strong = {name: found.curve(found.strong, *way) for name, way in STRONG.items()}
    weak = {name: [one / t for t in found.curve(found.weak, *way)] for name, way in WEAK.items()}
    best = {name: min(zip(times, found.gpus, strict=True)) for name, times in strong.items()}
    about = found.about
    lines = [
        f"torch {about['torch'].split('+')[0]}, triton {about['triton']}, {about['device']}, {about['date']};",
        f"raw results in `{RESULTS.relative_to(ROOT)}`, written by `make scaling`.",
        "",
        f"Read from the code of one rank of R, N={found.tokens} H={found.width} V={found.vocab} bf16: peak over inputs",
        "(MiB), collectives of forward and backward together, and what the rank sends in them at least (MiB):",
        "",
        "| R | tokens | one chunk | vocab |",
        "|---|---|---|---|",
        *(f"| {r} | " + " | ".join(_read(found, strategy, r) for strategy in STRATEGIES) + " |" for r in found.gpus),
        "",
        f"Strong scaling, predicted: {found.tokens} tokens a step on G GPUs together, milliseconds and efficiency:",
        "",
        "| G | " + " | ".join(strong) + " |",
        "|" + "---|" * (len(strong) + 1),
        *(
            f"| {g} | " + " | ".join(f"{1e3 * t[i]:.2f}, {one / g / t[i]:.0%}" for t in strong.values()) + " |"
            for i, g in enumerate(found.gpus)
        ),
        "",
        fill("The least: " + "; ".join(f"{n}, {1e3 * t:.2f} ms on {g}" for n, (t, g) in best.items()) + ".", 120),
        "",
        "Where the time of ranks with one chunk goes (ms): computing, sending, and waiting for calls and their steps:",
        "",
        "| G | computing | sending | waiting |",
        "|---|---|---|---|",
        *(f"| {g} | " + " | ".join(f"{1e3 * part:.3f}" for part in _parts(found, g)) + " |" for g in found.gpus),
        "",
        f"Weak scaling, predicted: {found.tokens} tokens a step for each GPU, efficiency:",
        "",
        "| G | " + " | ".join(weak) + " |",
        "|" + "---|" * (len(weak) + 1),
        *(f"| {g} | " + " | ".join(f"{e[i]:.0%}" for e in weak.values()) + " |" for i, g in enumerate(found.gpus)),
    ]
    return "\n".join(lines) + "\n"


def _read(found: Scaling, strategy: str, ranks: int) -> str:
    peak = max(found.rows[strategy, ranks, found.tokens]["peak_bytes"])
    collectives = found.collectives(strategy, ranks, found.tokens)
    sent = sum((one.sent_bytes or 0) * count for one, count in collectives)
    return f"{peak / MIB:,.0f}, {sum(count for _, count in collectives)}, {sent / MIB:.1f}"


def _parts(found: Scaling, ranks: int) -> tuple[float, float, float]:
    """Sending is what collectives take of a network that answers at once."""
    shape = "one chunk", ranks, found.tokens
    whole = found.sent(*shape)
    idle = sum(n * found._seconds(Collective(kind=c.kind, size=0, ranks=c.ranks)) for c, n in found.collectives(*shape))
    return found.computed(*shape), whole - idle, idle


def digest() -> bytes:
    """Stands in the picture, and says what it was drawn from."""
    return sha256(figures().encode()).hexdigest().encode()


def draw() -> None:
    """Write the picture, and its partner for dark pages."""
    write(_figure, PICTURE, dpi=150, metadata={"Source": digest().decode()})


def _figure() -> Any:
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    found = read()
    one = found.strong("tokens", 1, 1)
    figure = Figure(figsize=(13, 5.6), layout="constrained")
    strong, weak, memory = figure.subplots(1, 3)
    shape = f"N={found.tokens} H={found.width} V={found.vocab} bf16, {found.about['device']}"
    figure.suptitle(f"{shape}; memory is read, times are predicted", fontsize=10)
    strong.set_title(f"Strong scaling: {found.tokens} tokens a step")
    strong.set_ylabel("time of a step (ms)")
    strong.loglog(found.gpus, [1e3 * one / g for g in found.gpus], "--", color=rcParams["text.color"], label="ideal")
    for name, way in STRONG.items():
        times = [1e3 * t for t in found.curve(found.strong, *way)]
        strong.loglog(found.gpus, times, "o-", color=COLORS[name], label=name, markersize=4)
    weak.set_title(f"Weak scaling: {found.tokens} tokens a step for each GPU")
    weak.set_ylabel("efficiency (%)")
    for name, way in WEAK.items():
        shares = [100 * one / t for t in found.curve(found.weak, *way)]
        weak.semilogx(found.gpus, shares, "o-", color=COLORS[name], label=name, markersize=4)
    weak.set_ylim(0, 105)
    memory.set_title("Peak over the inputs, a rank")
    memory.set_ylabel("memory (GiB)")
    for strategy, name in zip(STRATEGIES, STRONG, strict=False):
        peaks = [max(found.rows[strategy, r, found.tokens]["peak_bytes"]) / 2**30 for r in found.gpus]
        memory.loglog(found.gpus, peaks, "o-", color=COLORS[name], label=name, markersize=4)
    for axes in (strong, weak, memory):
        axes.axvspan(1, found.network.node, color=BLUE, alpha=0.1, linewidth=0)
        axes.set_xlabel("GPUs; shaded: one node, NVLink alone")
        axes.set_xticks(found.gpus, [str(g) for g in found.gpus], fontsize=8)
        axes.minorticks_off()
        axes.grid()
        axes.legend(fontsize=9)
        axes.yaxis.set_major_formatter(lambda value, _position: f"{value:g}")
    return figure
