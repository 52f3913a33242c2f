"""Merge adapters into their base in float32, compare the logits, write in the base's dtype."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from tunesmith.data.templates.load import load_template
from tunesmith.data.templates.template import Template
from tunesmith.errors import ModelError, RunError
from tunesmith.export.card import ModelCard, TemplateChoice, read_choice
from tunesmith.export.folder import base_name, write_model
from tunesmith.model.adapters import AdapterState, began_quantized
from tunesmith.model.adapters.merge import add_difference, fold, merged_names, untie
from tunesmith.model.causal_lm import CausalLM
from tunesmith.model.load import load_causal_lm
from tunesmith.model.model_files import open_weights, weight_files
from tunesmith.model.quantization.dequantize import quant_method
from tunesmith.model.source import ModelSource, read_json, resolve_model

TOLERANCE = 1e-4
"""Relative L2 distance of logits that float32 arithmetic in another order may make."""
PROBES = (
    "The capital of France is Paris, and the Seine runs through it.",
    "def add(a, b):\n    return a + b\n\nprint(add(2, 3))  # 5",
    "1, 1, 2, 3, 5, 8, 13, 21: each number is the sum of the two before it.",
    "Wie spät ist es? Il est midi. ¿Y mañana? 今日は良い天気です。",
)
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True, slots=True)
class Part:
    """An adapter with its base, and how much of it goes in."""

    source: ModelSource
    weight: float = 1.0

    @property
    def adapter(self) -> Path:
        assert self.source.adapter_folder is not None
        return self.source.adapter_folder


@dataclass(frozen=True, slots=True)
class MergeReport:
    """Relative L2 distances of the probes' logits."""

    dtype: str  # of the written weights
    merging: float  # float32, adapter on top against merged; the largest of all adapters
    rounding: float  # merged in float32 against rounded to `dtype`
    reloading: float  # rounded against read back from the folder


def find_part(name: str, *, weight: float = 1.0, base: str | None = None) -> Part:
    """The adapter of a run or folder, on the base it names or on `base`, which must be the same.

    Raises:
        ModelError: no adapter there, or it belongs to another base.
    """
    folder = _adapter_folder(name)
    if folder is None:
        source = resolve_model(name)
        if source.adapter_folder is None:
            raise ModelError("holds a whole model, no adapter to merge", where=name)
        folder = source.adapter_folder
    if base is None:
        return Part(resolve_model(str(folder)), weight)
    given = resolve_model(base)
    if given.adapter_folder is not None:
        raise ModelError("is an adapter; the base must be a whole model", where=base)
    try:
        named: ModelSource | None = resolve_model(str(folder))
    except ModelError:
        named = None  # its base is not where it was; the one given stands for it
    if named is not None and named.folder != given.folder:
        raise ModelError(f"is an adapter for {named.folder}, not for {base}", where=name)
    return Part(replace(given, adapter_folder=folder), weight)


def merge_adapters(
    parts: Sequence[Part], out: Path, *, trust_remote_code: bool = False, overwrite: bool = False
) -> MergeReport:
    """Write `out`: the base plus the weighted sum of what each adapter changes.

    Raises:
        ModelError: the adapters are for different bases, or merging changes what one computes.
        RunError: the folder can't be written, or reads back as another model.
    """
    _refuse(parts, out, overwrite)
    first = parts[0].source
    choice = read_choice(parts[0].adapter) or TemplateChoice()
    template = load_template(
        first.tokenizer_folder,
        template="none" if choice.raw else None,
        kwargs=choice.template_kwargs,
        trust_remote_code=trust_remote_code,
        dated=True,
    )
    probes = _probes(template)
    merged = _merged(parts, probes, trust_remote_code)
    model = merged.model
    dtype = stored_dtype(first.folder)
    card = ModelCard(
        base_model=base_name(model, first),
        base_commit=first.commit,
        choice=choice,
        recipe=_recipe(parts[0]),
    )
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=out.absolute().parent, prefix=".merging-"))
    try:
        written = scratch / out.name
        write_model(model, template, first, written, card=card, adapter=merged.state, dtype=dtype)
        exact = _logits(model, probes)
        _round(model, dtype, merged.changed)
        rounded = _logits(model, probes)
        reloaded = load_causal_lm(
            ModelSource(str(written), written), dtype="float32", trust_remote_code=trust_remote_code
        ).model
        report = MergeReport(
            dtype=str(dtype).removeprefix("torch."),
            merging=merged.distance,
            rounding=_distance(rounded, exact),
            reloading=_distance(_logits(reloaded, probes), rounded),
        )
        if not report.reloading <= TOLERANCE:
            raise RunError(
                f"the written model computes other logits ({report.reloading:.1e} apart)",
                where=str(out),
            )
        if out.exists():
            shutil.rmtree(out)
        os.rename(written, out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return report


def stored_dtype(folder: Path) -> torch.dtype:
    """The dtype of most weights in a model folder's files, or what quantised ones are read as."""
    if quant_method(read_json(folder / "config.json")) is not None:
        return torch.bfloat16
    sizes: dict[str, int] = {}
    for path in weight_files(folder):
        with open_weights(path) as file:
            for name in file.keys():  # noqa: SIM118 - the file is no mapping
                part = file.get_slice(name)
                count = 1
                for length in part.get_shape():
                    count *= length
                sizes[part.get_dtype()] = sizes.get(part.get_dtype(), 0) + count
    found = max(sizes, key=lambda kind: sizes[kind])
    if found not in _DTYPES:
        raise ModelError(
            f"its weights are stored as {found}",
            where=str(folder),
            hint="give the unquantised model",
        )
    return _DTYPES[found]


@dataclass(frozen=True, slots=True)
class _Merged:
    """A model in float32 with adapters in its weights."""

    model: CausalLM
    state: AdapterState
    distance: float  # the largest that a merge made
    changed: frozenset[str]  # modules and parameters of the base that hold an adapter now


def _merged(parts: Sequence[Part], probes: list[Tensor], trust: bool) -> _Merged:
    if len(parts) == 1 and parts[0].weight == 1:
        return _folded(parts[0], probes, trust)
    plain = replace(parts[0].source, adapter_folder=None)
    total, base = (
        load_causal_lm(plain, dtype="float32", trust_remote_code=trust).model for _ in range(2)
    )
    worst, untied = 0.0, False
    changed: frozenset[str] = frozenset()
    for part in parts:
        merged = _folded(part, probes, trust)
        changed |= merged.changed
        worst = max(worst, merged.distance)
        untied = untied or merged.state.untied
        if untied:
            for model in (merged.model, total, base):
                untie(model)
        grown = merged.model.base.get_input_embeddings().weight.shape[0]
        if grown != base.base.get_input_embeddings().weight.shape[0]:
            raise ModelError(
                "the adapter brings tokens of its own, which can't be weighed or added up",
                where=str(part.adapter),
                hint="merge it alone, without a weight",
            )
        add_difference(_weights(total), _weights(merged.model), _weights(base), weight=part.weight)
    return _Merged(total, AdapterState(untied=untied), worst, changed)


def _folded(part: Part, probes: list[Tensor], trust: bool) -> _Merged:
    loaded = load_causal_lm(part.source, dtype="float32", trust_remote_code=trust)
    model = loaded.model
    before = _logits(model, probes)
    changed = frozenset(merged_names(model))
    state = fold(model, loaded.adapter)
    distance = _distance(_logits(model, probes), before)
    if not distance <= TOLERANCE:
        raise ModelError(
            f"merging would change what the model computes: its logits are {distance:.1e} apart, "
            f"{TOLERANCE:.0e} is allowed",
            where=str(part.adapter),
            hint="load it as an adapter instead",
        )
    return _Merged(model, state, distance, changed)


def _weights(model: CausalLM) -> dict[str, Tensor]:
    return dict(model.base.named_parameters())


def _refuse(parts: Sequence[Part], out: Path, overwrite: bool) -> None:
    folders = {part.source.folder for part in parts}
    if len(folders) > 1:
        names = " and ".join(sorted(map(str, folders)))
        raise ModelError(f"the adapters are for different bases: {names}", where=str(out))
    for part in parts:
        if began_quantized(part.adapter):
            raise ModelError(
                "began as what quantising took from the base; on the base itself that is too much",
                where=str(part.adapter),
                hint="load it as an adapter on the quantised base",
            )
    inside = [part.adapter for part in parts] + [parts[0].source.folder]
    if out.resolve() in (path.resolve() for path in inside):
        raise ModelError("is what would be merged from", where=str(out), hint="another --out")
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not overwrite:
        raise ModelError("is not empty", where=str(out), hint="another --out, or --overwrite")


def _adapter_folder(name: str) -> Path | None:
    path = Path(name).expanduser().resolve()
    for folder in (path, path / "model"):
        if (folder / "adapter_config.json").is_file():
            return folder
    return None


def _probes(template: Template) -> list[Tensor]:
    texts = [template.tokenizer(text, add_special_tokens=False)["input_ids"] for text in PROBES]
    return [torch.tensor([ids]) for ids in texts if ids]


@torch.no_grad()
def _logits(model: CausalLM, probes: list[Tensor]) -> Tensor:
    with model.generation() as plain:
        found = [plain(input_ids=ids, use_cache=False).logits[0].float() for ids in probes]
    return torch.cat(found)


def _distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@torch.no_grad()
def _round(model: CausalLM, dtype: torch.dtype, changed: Collection[str]) -> None:
    """What is unchanged is written as it lies in the base's files, in whatever precision."""
    for name, tensor in model.base.named_parameters():
        if name in changed or name.rpartition(".")[0] in changed:
            tensor.copy_(tensor.to(dtype))


def _recipe(part: Part) -> str:
    path = part.adapter.parent / "recipe.yaml"
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def quantization(part: Part) -> str:
    """How the base was kept while the adapter was trained; `none` where it was plain, or nobody
    says.
    """
    return str(_section(part, "model").get("quantization", "none"))


def _section(part: Part, name: str) -> dict[str, Any]:
    recipe = yaml.safe_load(_recipe(part))
    found = recipe.get(name) if isinstance(recipe, dict) else None
    return found if isinstance(found, dict) else {}


def describe(parts: Sequence[Part]) -> list[dict[str, Any]]:
    """The adapters and their weights as plain values."""
    return [{"adapter": str(part.adapter), "weight": part.weight} for part in parts]


def to_json(report: MergeReport, parts: Sequence[Part], out: Path) -> str:
    """The report as one JSON object."""
    values = {name: getattr(report, name) for name in report.__slots__}
    return json.dumps({"out": str(out), "adapters": describe(parts), **values})
