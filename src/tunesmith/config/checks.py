"""Combinations of values that a recipe must not have, although each value is valid."""

from __future__ import annotations

from typing import Any, cast

from tunesmith.config.document import Document
from tunesmith.config.sections.model import ALL, FITS, fits
from tunesmith.config.sections.objective import BELONGS, unfit


def check_combinations(document: Document, *, held_out: bool = False) -> None:
    """Note a problem for each combination of keys that contradict each other.

    `held_out`: evaluation rows are given apart from the recipe, so `data.eval` may be missing.
    """
    train, data = _section(document, "train"), _section(document, "data")
    if train.get("result") == "best" and data.get("eval") is None and not held_out:
        document.complain(
            ("train", "result"),
            "best means the lowest loss on evaluation data, and data.eval is not given",
            "hold out a part of the rows with data.eval=2%, or name a file",
        )
    _check_batch(document)
    _check_quantization(document)
    _check_adapter(document)
    _check_objective(document)


def _check_batch(document: Document) -> None:
    batch, data = _section(document, "batch"), _section(document, "data")
    packing = batch.get("packing", "none")
    train = data.get("train")
    sources = cast("list[Any]", train) if isinstance(train, list) else []
    mixed = any(
        cast("dict[str, Any]", one).get(key) is not None
        for one in sources
        if isinstance(one, dict)
        for key in ("weight", "epochs")
    )
    if packing != "none":
        if batch.get("pack_tokens") is None and data.get("max_length", "auto") == "auto":
            document.complain(
                ("batch", "packing"),
                "needs the number of tokens per pack",
                "add batch.pack_tokens=2048, or give data.max_length as a number",
            )
        if data.get("too_long") == "split":
            document.complain(
                ("data", "too_long"),
                "is split, and batch.packing cuts long documents as well",
                "remove data.too_long; batch.packing=bfd_split splits long documents",
            )
    if mixed and packing == "wrapped":
        document.complain(
            ("batch", "packing"),
            "wrapped needs one stream of all documents, which weights or epochs of sources change",
            "batch.packing=bfd, or remove weight and epochs of the sources",
        )
    if batch.get("group_by_prefix") is True:
        if mixed:
            document.complain(
                ("batch", "group_by_prefix"),
                "puts similar documents into one step, and weights or epochs of sources distribute "
                "them",
                "remove one of the two",
            )
        if data.get("shuffle") is False:
            document.complain(
                ("batch", "group_by_prefix"),
                "changes the order of documents, and data.shuffle=false keeps the order of the "
                "data",
                "remove one of the two",
            )


def _check_quantization(document: Document) -> None:
    model = _section(document, "model")
    if model.get("double_quantization") and model.get("quantization") not in ("nf4", "fp4"):
        document.complain(
            ("model", "double_quantization"),
            "has an effect on the scales of nf4 and fp4 only",
            "add model.quantization=nf4, or remove the key",
        )


def _check_adapter(document: Document) -> None:
    adapter = _section(document, "adapter")
    kind = str(adapter.get("kind", "none"))
    if kind == "none" and adapter.get("continue_from"):
        return  # the saved adapter decides the kind, and so which keys have an effect
    for key, value in adapter.items():
        if value in (None, {}) or fits(key, kind):
            continue
        if kind == "none":
            document.complain(
                ("adapter", key),
                "has no effect with adapter.kind=none, which trains the model's own parameters",
                "add adapter.kind=lora, or remove the key",
            )
        elif kind in ALL:
            document.complain(
                ("adapter", key),
                f"has no effect on {kind}",
                f"remove it; it has an effect on {', '.join(FITS[key])}",
            )
    if adapter.get("parameters") is not None and adapter.get("top_layers") is not None:
        document.complain(
            ("adapter", "top_layers"),
            "chooses the trained parameters, and so does adapter.parameters",
            "give one of the two",
        )


def _check_objective(document: Document) -> None:
    objective, device = _section(document, "objective"), _section(document, "device")
    name = str(objective.get("name", "nll"))
    for key, value in objective.items():
        if value is not None and unfit(key, name):
            document.complain(
                ("objective", key),
                f"has an effect on {', '.join(BELONGS[key])} only, and the objective is {name}",
                "remove the key, or choose one of these objectives",
            )
    if objective.get("scheduled_sampling"):
        if name == "psft":
            document.complain(
                ("objective", "scheduled_sampling"),
                "psft compares probabilities in the same context, and sampled tokens change the "
                "context",
                "remove one of the two",
            )
        if device.get("share_prefixes") is True:
            document.complain(
                ("device", "share_prefixes"),
                "a sampled token in one document would be read by the documents that share its "
                "prefix",
                "device.share_prefixes=auto, which is off with objective.scheduled_sampling",
            )


def _section(document: Document, name: str) -> dict[str, Any]:
    section = document.data.get(name)
    return cast("dict[str, Any]", section) if isinstance(section, dict) else {}
