"""The probes of the self-test: made-up paths run alone, packed and as a tree, and their
differences.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tunesmith.errors import ModelError
from tunesmith.model.attention.dispatch import NAME
from tunesmith.model.causal_lm import CausalLM
from tunesmith.model.lm_head import LogitTransform, fitted_transforms, head_inputs, logit_caps
from tunesmith.model.ops.numerics import (
    NARROW,
    Comparison,
    equivalence_trial,
    relative_difference,
    whole_model_bound,
)
from tunesmith.types import Batch, Chain, Layout, TargetOwners

_LARGEST_WINDOW = 512
_SOME_LOGITS = 8192
_BEYOND = 13  # tokens a path goes beyond the window


@contextmanager
def native(causal_lm: CausalLM) -> Iterator[None]:
    if causal_lm.unpacked:
        yield
        return
    causal_lm.set_attention(causal_lm.native_attention)
    try:
        yield
    finally:
        causal_lm.set_attention(NAME)


@contextmanager
def in_float32(causal_lm: CausalLM, wanted: bool) -> Iterator[None]:
    """Compute in float32 with 16-bit weights: a module's own are upcast while it runs, so that
    only one is at a time.

    Rounding then cannot hide a small difference, nor flip an expert and look like a large one.
    """
    if not wanted:
        yield
        return
    narrow: dict[torch.nn.Module, list[tuple[Tensor, Tensor]]] = {}

    def upcast(module: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        # a mixer reads the weights of its convolution without calling it
        whole = any(isinstance(child, torch.nn.Conv1d) for child in module.children())
        tensors = [*module.parameters(recurse=whole), *module.buffers(recurse=whole)]
        narrow[module] = [(t, t.data) for t in tensors if t.dtype in NARROW]
        for tensor, data in narrow[module]:
            tensor.data = data.float()
        # mamba gives its head hidden states in the precision of the head's weights
        if not narrow[module] or not any(_is_narrow(each) for each in inputs):
            return None
        return tuple(each.float() if _is_narrow(each) else each for each in inputs)

    def restore(module: torch.nn.Module, *_: Any) -> None:
        for tensor, data in narrow.pop(module, []):
            tensor.data = data

    handles: list[Any] = []
    for module in causal_lm.model.modules():
        handles.append(module.register_forward_pre_hook(upcast))
        handles.append(module.register_forward_hook(restore, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in list(narrow):
            restore(module)


class Probe:
    """Made-up paths, their hidden states alone, and the comparisons."""

    def __init__(self, causal_lm: CausalLM, max_length: int) -> None:
        self.causal_lm = causal_lm
        self.max_length = max_length
        self.device = causal_lm.head.weight.device
        config = causal_lm.config.get_text_config()
        vocabulary = causal_lm.head.weight.shape[0]
        window = _small_window(config)
        self.beyond = _BEYOND if window else 0
        generator = torch.Generator().manual_seed(0)

        def draw(count: int) -> Tensor:
            ids = torch.randint(vocabulary // 8, vocabulary // 2, (count,), generator=generator)
            return ids.to(self.device)

        # first document shorter than the second; every path of the tree goes beyond a small window
        self.documents = [draw(9), draw(max(23, window + _BEYOND)), draw(5)]
        self.trunk = draw(12)
        self.branches = [draw(7), draw(max(15, window + _BEYOND)), draw(4)]
        self.twig = draw(6)  # continues the second branch
        self.reference: dict[str, Tensor] = {}
        self.upcast = self._can_upcast()
        narrow = any(p.dtype in NARROW for p in causal_lm.parameters())
        self.exact = self.upcast or not narrow
        computed = torch.float32 if self.exact else torch.bfloat16
        self.rounding = whole_model_bound(computed, self.device)
        self.tolerance = self.rounding

    def _can_upcast(self) -> bool:
        if all(p.dtype not in NARROW for p in self.causal_lm.parameters()):
            return False
        try:
            with native(self.causal_lm), in_float32(self.causal_lm, True):
                return self._alone(self.documents[0]).dtype == torch.float32
        except (RuntimeError, TypeError, ValueError):
            return False

    @property
    def paths(self) -> dict[str, Tensor]:
        """Root-to-leaf token ids of everything that is tested."""
        paths = {f"document {i}": ids for i, ids in enumerate(self.documents)}
        paths |= {f"branch {i}": torch.cat([self.trunk, self.branches[i]]) for i in (0, 2)}
        paths["twig"] = torch.cat([self.trunk, self.branches[1], self.twig])
        return paths

    def learn_references(self) -> None:
        self.reference = {name: self._alone(ids) for name, ids in self.paths.items()}
        if not self.exact:
            # what a leak of a whole document would look like; rounding stays far below it
            glued = self._alone(torch.cat(self.documents[:2]))[len(self.documents[0]) :]
            leak = self._compare(glued, self.reference["document 1"])
            self.tolerance = min(self.rounding, leak / 2)

    def head(self) -> float:
        """The difference of our head's logits from the model's; where the transform that the config
        names is not the model's, one that is takes its place.
        """
        ids = self.documents[1]
        theirs = self.causal_lm.base(input_ids=ids[None], use_cache=False).logits[0].float()
        reference = self.reference["document 1"]
        hidden, weight, bias = head_inputs(self.causal_lm.head, reference)
        some = slice(0, _SOME_LOGITS)
        bias = None if bias is None else bias[some].to(hidden.dtype)
        theirs = theirs[:, some]
        # A model may round hidden states to the precision of its head first.
        rounded = hidden.to(weight.dtype).to(hidden.dtype)
        ours = [
            torch.nn.functional.linear(states, weight[some].to(hidden.dtype), bias).float()
            for states in (hidden, rounded)
        ]

        def difference(transform: LogitTransform) -> float:
            return min(self._compare(transform.apply(raw), theirs) for raw in ours)

        stated = difference(self.causal_lm.logits)
        if stated <= self.rounding:
            return stated
        config = self.causal_lm.config.get_text_config()
        for raw in ours:
            for transform in fitted_transforms(raw, theirs, logit_caps(config)):
                if (found := difference(transform)) <= self.rounding:
                    self.causal_lm.logits = transform
                    return found
        return stated

    def causal(self) -> float:
        whole, half = self.reference["document 1"], len(self.documents[1]) // 2
        return self._compare(whole[:half], self._alone(self.documents[1][:half]))

    def packed(self) -> float:
        hidden = self._together([(ids, ()) for ids in self.documents])
        bounds = np.cumsum([0, *map(len, self.documents)])
        parts = [hidden[a:b] for a, b in pairwise(bounds)]
        return max(
            self._compare(part, self.reference[f"document {i}"]) for i, part in enumerate(parts)
        )

    def tree(self) -> float:
        n, (a, b, c) = len(self.trunk), map(len, self.branches)
        trunk, second = (0, n), (n, n + b)
        rows = [
            (self.trunk, ()),
            (self.branches[1], (trunk,)),
            (self.twig, (trunk, second)),
            (self.branches[0], (trunk,)),
            (self.branches[2], (trunk,)),
        ]
        hidden = self._together(rows)
        after = n + b + len(self.twig)
        found = {
            "twig": hidden[:after],
            "branch 0": torch.cat([hidden[:n], hidden[after : after + a]]),
            "branch 2": torch.cat([hidden[:n], hidden[after + a : after + a + c]]),
        }
        return max(self._compare(part, self.reference[name]) for name, part in found.items())

    def neighbour(self) -> float:
        ids, other = self.documents[0], self.documents[2]
        last = max(self.max_length, len(other))
        position = torch.cat([torch.arange(len(ids)), torch.arange(last - len(other), last)])
        hidden = self._together([(ids, ()), (other, ())], position=position)
        difference = self._compare(hidden[: len(ids)], self.reference["document 0"])
        # RoPE that grows with the longest position keeps what it saw until a short call resets it
        self._together([(ids, ())])
        return difference

    def noisy(self) -> bool:
        ids = self.documents[0]
        chain = (Chain(0, len(ids), ()),)
        layout = None if self.causal_lm.unpacked else _layout(chain, torch.arange(len(ids)))
        batch = batch_of(ids, torch.arange(len(ids)), layout)
        calm = self.causal_lm.hidden(batch)
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            self.causal_lm.train()
            restless = self.causal_lm.hidden(batch)
            self.causal_lm.eval()
        if torch.equal(calm, restless):
            return False
        return relative_difference(restless, calm, robust=True) > 1e-6

    def _alone(self, ids: Tensor) -> Tensor:
        output = self.causal_lm.hidden(batch_of(ids, torch.arange(len(ids)), None))
        width = self.causal_lm.head.weight.shape[1]
        if output.shape != (len(ids), width):
            raise ModelError(f"the decoder returns {tuple(output.shape)}, the head takes {width}")
        return output

    def _together(
        self,
        rows: Sequence[tuple[Tensor, tuple[tuple[int, int], ...]]],
        *,
        position: Tensor | None = None,
    ) -> Tensor:
        """Hidden states of chains side by side; each with the spans of its ancestors."""
        chains: list[Chain] = []
        positions: list[Tensor] = []
        for ids, prefix in rows:
            start = chains[-1].end if chains else 0
            chains.append(Chain(start, start + len(ids), prefix))
            above = sum(b - a for a, b in prefix)
            positions.append(torch.arange(above, above + len(ids)))
        where = torch.cat(positions) if position is None else position
        layout = _layout(tuple(chains), where)
        return self.causal_lm.hidden(batch_of(torch.cat([ids for ids, _ in rows]), where, layout))

    def _compare(self, found: Tensor, expected: Tensor) -> float:
        """The difference of hidden states, also of those beyond the window alone; relative."""

        def compare() -> Iterator[Comparison]:
            yield Comparison(found, expected, 1.0, robust=not self.exact)
            if self.beyond and len(found) > self.beyond:
                tail = slice(-self.beyond, None)
                yield Comparison(found[tail], expected[tail], 1.0, robust=not self.exact)

        return equivalence_trial(compare, catch=()).excess


def batch_of(ids: Tensor, position: Tensor, layout: Layout | None) -> Batch:
    """These tokens without targets, on the device of `ids`."""
    none = torch.empty(0, dtype=torch.int64, device=ids.device)
    nobody = np.empty(0, np.int32)
    return Batch(
        input_ids=ids,
        position_ids=position.to(ids.device),
        layout=layout,
        source=none,
        target=none,
        weight=none.float(),
        owners=TargetOwners(nobody, nobody, np.empty(0, np.float32)),
    )


def _is_narrow(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in NARROW


def _small_window(config: Any) -> int:
    """The window (or chunk) of the layers that have one if a test can go beyond it, else 0: then
    the rule is trusted.
    """
    sizes = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return max(
        (size for size in sizes if isinstance(size, int) and 0 < size < _LARGEST_WINDOW), default=0
    )


def _layout(chains: tuple[Chain, ...], position: Tensor) -> Layout:
    """A layout of chains laid out depth first, each given with all its ancestors."""
    total = chains[-1].end
    until = np.empty(total, np.int32)
    for chain in chains:
        below = [c.end for c in chains if (chain.start, chain.end) in c.prefix]
        until[chain.start : chain.end] = max([chain.end, *below])
    return Layout(chains, until, position.numpy().astype(np.int32))
