"""Training on 8 to 1024 devices, on paper: memory by part, traffic of a step, time, what breaks.

    python benchmarks/scale_on_paper.py

Nothing here is measured. Sizes of models come from their shapes, sizes of states from the same
rules as `tunesmith plan`, times from the constants of `DEVICE` and `NET`, which are assumptions
about one class of machine and are written into the tables' head. Writes the tables into
docs/scale.md, between its two marks; `--check` says whether they are what this script gives.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs" / "scale.md"
BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"
GIB = 1 << 30
GB = 1e9


@dataclass(frozen=True)
class Device:
    """One accelerator of the class that is assumed."""

    memory: int = 80 * GIB
    reserved: int = 6 * GIB  # context, NCCL's buffers, kernels' workspaces, fragments
    peak: float = 989e12  # dense bf16 operations a second, as vendors give it
    reached: float = 0.50  # share of it that products and attention of a step reach together
    per_node: int = 8
    host: int = 1536 * GIB  # memory of a node


@dataclass(frozen=True)
class Net:
    """Bytes a second that a device sends and receives at once, and seconds that a message takes."""

    inside: float = 450e9  # within a node, one direction
    between: float = 50e9  # between nodes, one direction, a 400 Gbit/s card a device
    reached: float = 0.80  # share of either that large collectives reach
    latency: float = 6e-6  # a hop of a ring
    hidden: float = 0.90  # share of computing that traffic can hide behind


DEVICE, NET = Device(), Net()
MICRO_TOKENS = 8192
"""Tokens that go through a device at a time, where they fit."""
BATCH = 1 << 19
"""Tokens of a step that is the same on any number of devices: 128 documents of 4,096."""
CHUNK = 1024
"""Targets whose logits the head holds at a time."""
COUNTS = (8, 16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Model:
    """The shape of a dense decoder with grouped queries and a gated feed-forward."""

    name: str
    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    vocabulary: int
    head_width: int = 128

    @property
    def layer(self) -> int:
        """Parameters of a layer."""
        queries, keys = self.heads * self.head_width, self.kv_heads * self.head_width
        attention = 2 * self.hidden * queries + 2 * self.hidden * keys
        return attention + 3 * self.hidden * self.inner + 2 * self.hidden

    @property
    def outside(self) -> int:
        """Parameters of embedding, head and final norm, which are one group."""
        return 2 * self.vocabulary * self.hidden + self.hidden

    @property
    def parameters(self) -> int:
        return self.layers * self.layer + self.outside

    def flops(self, tokens: int, *, length: int = 4096) -> float:
        """Operations of a step with every layer recomputed: 8 a weight and token, and attention's
        scores and sums over documents of `length` tokens, half of them masked. The lookup in the
        embedding is none.
        """
        weights = self.layers * self.layer + self.vocabulary * self.hidden
        scores = 4 * self.heads * self.head_width * self.layers * length / 2
        return tokens * (8 * weights + 4 * scores)

    def useful(self, tokens: int, *, length: int = 4096) -> float:
        """The same without recomputing: three quarters."""
        return self.flops(tokens, length=length) * 3 / 4


MODELS = (
    Model("8B", 32, 4096, 14336, 32, 8, 128256),
    Model("70B", 80, 8192, 28672, 64, 8, 128256),
    Model("405B", 126, 16384, 53248, 128, 8, 128256),
)


@dataclass(frozen=True)
class Rank:
    """Bytes that a rank holds at the peak of a step, by part."""

    weights: float
    gradients: float
    optimizer: float
    gathered: float  # the layer at work, the next one, and the group of embedding and head
    reduced: float  # a layer's gradients before they are summed and dealt out
    activations: float
    head: float

    @property
    def total(self) -> float:
        return sum(vars(self).values())

    @property
    def fits(self) -> bool:
        return self.total <= DEVICE.memory - DEVICE.reserved


def memory(model: Model, *, parts: int, micro: int = MICRO_TOKENS) -> Rank:
    """A rank of `parts` that share the states: bf16 weights, what completes a float32 master, two
    float32 moments, and float32 gradients that are kept in parts.
    """
    count = model.parameters / parts
    queries = model.heads * model.head_width + 2 * model.kv_heads * model.head_width
    # what the backward of the layer that is being recomputed keeps, as `tunesmith plan` counts it
    working = micro * 2 * (8 * model.hidden + queries + 4 * model.inner)
    inputs = micro * 2 * model.hidden * model.layers
    whole = parts == 1
    return Rank(
        weights=2 * count,
        gradients=4 * count,
        optimizer=(2 + 8) * count,
        gathered=0 if whole else 2 * (2 * model.layer + model.outside),
        reduced=0 if whole else 4 * (model.layer + model.outside),
        activations=inputs + working,
        head=CHUNK * model.vocabulary * (4 + 4 + 2) + 4 * MICRO_TOKENS * 8,
    )


@dataclass(frozen=True)
class Step:
    """Bytes that a device sends in a step, inside its node and between nodes, and seconds."""

    inside: float
    between: float
    compute: float
    traffic: float
    waiting: float  # traffic that nothing hides

    @property
    def seconds(self) -> float:
        return self.compute + self.waiting

    @property
    def efficiency(self) -> float:
        return self.compute / self.seconds


def step(
    model: Model, *, devices: int, shard: str, micro: int = MICRO_TOKENS, batches: int = 1
) -> Step:
    """A step of `batches` micro-batches on every device; bytes are those that a device sends.

    full: each layer's weights are gathered for the forward and again for the backward, and its
    gradients are summed and dealt out, each micro-batch, among all; embedding and head are gathered
    once a step. hybrid: the same inside a node, and once a step the float32 gradients of a part are
    summed across nodes. A ring sends (n-1)/n of the whole for a gather, and twice that for a sum
    that all keep.
    """
    local = min(devices, DEVICE.per_node)
    nodes = max(1, devices // DEVICE.per_node)
    weights = batches * 2 * 2 * model.layers * model.layer + 2 * model.outside
    moved = weights + batches * 4 * model.parameters
    collectives = 3 * batches * model.layers + 2
    if shard == "full":
        inside = moved * (devices - 1) / devices
        between = inside / local if nodes > 1 else 0.0
        # One ring through all, laid over every card of a node: the slower kind of link decides.
        seconds = max(_time(inside, NET.inside), _time(between, NET.between))
        hops = collectives * (devices - 1)
    else:
        inside = moved * (local - 1) / local
        between = 2 * 4 * model.parameters / local * (nodes - 1) / nodes
        seconds = _time(inside, NET.inside) + _time(between, NET.between)
        hops = collectives * (local - 1) + 2 * (nodes - 1)
    traffic = seconds + hops * NET.latency
    compute = model.flops(micro * batches) / (DEVICE.peak * DEVICE.reached)
    waiting = max(0.0, traffic - NET.hidden * compute)
    return Step(inside, between, compute, traffic, waiting)


def _time(size: float, rate: float) -> float:
    return size / (rate * NET.reached)


def longest(model: Model, *, parts: int, most: int = 1 << 20) -> int | None:
    """The longest micro-batch that fits, a power of two from 256 to `most`; None if none does."""
    sizes = [1 << n for n in range(8, 21) if 1 << n <= most]
    fitting = [size for size in sizes if memory(model, parts=parts, micro=size).fits]
    return max(fitting, default=None)


def gib(size: float) -> str:
    return f"{size / GIB:.1f}"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def memory_table(model: Model) -> str:
    rows = []
    for shard, counts in (("full", COUNTS), ("hybrid", (8,))):
        for devices in counts:
            one = memory(model, parts=devices)
            name = f"full, {devices}" if shard == "full" else "hybrid, any number"
            rows.append([name, *map(gib, vars(one).values()), gib(one.total), yes(one.fits)])
    parts = ["weights", "gradients", "optimizer", "gathered", "reduced", "activations", "head"]
    return table(["shard, devices", *parts, "sum", "fits"], rows)


def yes(fits: bool) -> str:
    return "yes" if fits else "**no**"


def _count(number: int | None) -> str:
    return "none" if number is None else f"{number:,}"


def _ways(model: Model) -> list[tuple[str, int, int]]:
    """Each way to share and number of devices that can hold the model, with its micro-batch."""
    found = []
    for devices in COUNTS:
        for shard in ("full", "hybrid"):
            if shard == "hybrid" and devices == DEVICE.per_node:
                continue
            parts = devices if shard == "full" else DEVICE.per_node
            micro = longest(model, parts=parts, most=MICRO_TOKENS)
            if micro is not None:
                found.append((shard, devices, micro))
    return found


def step_table(model: Model) -> str:
    """Every device has one micro-batch: the step grows with the devices."""
    rows = []
    for shard, devices, micro in _ways(model):
        one = step(model, devices=devices, shard=shard, micro=micro)
        rate = micro * devices / one.seconds
        used = model.useful(micro) / one.seconds / DEVICE.peak
        rows.append(
            [
                f"{shard}, {devices}",
                f"{micro:,}",
                f"{micro * devices / 1e6:.2f}",
                f"{one.inside / GB:.1f}",
                f"{one.between / GB:.1f}",
                f"{one.compute:.2f}",
                f"{one.traffic:.2f}",
                f"{one.efficiency:.0%}",
                f"{used:.0%}",
                f"{rate / 1e3:,.0f}",
            ]
        )
    head = ["shard, devices", "tokens a device", "M tokens a step", "GB inside", "GB between"]
    head += ["s computing", "s traffic", "efficiency", "of peak", "k tokens/s"]
    return table(head, rows)


def fixed_table(model: Model) -> str:
    """The step stays as it is: each device has ever less of it."""
    rows = []
    for shard, devices, room in _ways(model):
        own = BATCH // devices
        micro = min(room, own)
        one = step(model, devices=devices, shard=shard, micro=micro, batches=own // micro)
        rows.append(
            [
                f"{shard}, {devices}",
                f"{own:,}",
                str(own // micro),
                f"{one.compute:.2f}",
                f"{one.traffic:.2f}",
                f"{one.seconds:.2f}",
                f"{one.efficiency:.0%}",
            ]
        )
    head = ["shard, devices", "tokens a device", "micro-batches", "s computing", "s traffic"]
    return table([*head, "s a step", "efficiency"], rows)


def break_table() -> str:
    """For each model: the fewest devices, the longest micro-batch, and the host's memory."""
    rows = []
    for model in MODELS:
        fits = [n for n in COUNTS if longest(model, parts=n) is not None]
        hybrid = longest(model, parts=DEVICE.per_node)
        rows.append(
            [
                model.name,
                f"{model.parameters / 1e9:.1f}",
                gib(16 * model.parameters),
                str(min(fits, default="none")),
                "no" if hybrid is None else "yes",
                *(_count(longest(model, parts=n)) for n in (64, 1024)),
                f"{14 * model.parameters / GB:,.0f}",
                f"{2 * model.parameters / DEVICE.host:.0%}",
            ]
        )
    head = ["model", "G parameters", "GiB of states", "fewest devices, full", "fits in a node"]
    head += ["longest micro-batch, 64 devices", "1024 devices", "GB of a checkpoint"]
    return table([*head, "bf16 weights, of a host's memory"], rows)


def assumptions() -> str:
    rows = [
        ["memory of a device", f"{DEVICE.memory / GIB:.0f} GiB, {gib(DEVICE.reserved)} kept free"],
        ["dense bf16 peak", f"{DEVICE.peak / 1e12:,.0f} TFLOP/s, {DEVICE.reached:.0%} reached"],
        ["devices in a node", f"{DEVICE.per_node}"],
        ["inside a node", f"{NET.inside / GB:.0f} GB/s a device and direction"],
        ["between nodes", f"{NET.between / GB:.0f} GB/s a device and direction"],
        ["collectives reach", f"{NET.reached:.0%} of either"],
        ["a hop of a ring", f"{NET.latency * 1e6:.0f} microseconds"],
        ["traffic hides behind", f"{NET.hidden:.0%} of computing"],
        ["tokens on a device at a time", f"{MICRO_TOKENS:,}, in documents of 4,096"],
        ["head", f"logits of {CHUNK:,} targets at a time, in float32, with their gradients"],
        ["recomputed", "every layer"],
    ]
    return table(["assumed", "value"], rows)


def tables() -> str:
    parts = ["### Assumed", assumptions(), "### Where it begins and ends", break_table()]
    for model in MODELS:
        parts += [f"### {model.name}: GiB on a rank", memory_table(model)]
        parts += [f"### {model.name}: one micro-batch a device", step_table(model)]
        parts += [f"### {model.name}: a step of {BATCH:,} tokens in all", fixed_table(model)]
    return "\n\n".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    asked = parser.parse_args()
    text = DOCS.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    made = f"{before}{BEGIN}\n\n{tables()}\n\n{END}{after}"
    if asked.check:
        print("as computed" if made == text else "docs/scale.md differs: run this script")
        return int(made != text)
    DOCS.write_text(made, encoding="utf-8")
    print(tables())
    return 0


if __name__ == "__main__":
    sys.exit(main())
