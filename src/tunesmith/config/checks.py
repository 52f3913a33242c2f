"""Combinations of values that a recipe must not have, although each value is valid."""

from __future__ import annotations

from typing import Any, cast

from tunesmith.config.document import Document
from tunesmith.config.sections.adapter import ALL, FITS, fits
from tunesmith.config.sections.objective import BELONGS, unfit


def check_combinations(document: Document, *, held_out: bool = False) -> None:
    """Note the keys that contradict each other; `held_out`: evaluation rows come from elsewhere."""
    train, data = _section(document, "train"), _section(document, "data")
    if train.get("result") == "best" and data.get("eval") is None and not held_out:
        document.complain(
            ("train", "result"),
            "best is chosen by the loss on held-out data, and data.eval names none",
            "hold out a share of the rows with data.eval=2%, or name a file",
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
                "needs the tokens of a pack",
                "add batch.pack_tokens=2048, or give data.max_length as a number",
            )
        if data.get("too_long") == "split":
            document.complain(
                ("data", "too_long"),
                "is split, and batch.packing cuts as well",
                "take data.too_long away; batch.packing=bfd_split makes pieces of long documents",
            )
    if mixed and packing == "wrapped":
        document.complain(
            ("batch", "packing"),
            "is one stream of all documents, and weights or epochs of sources are another order",
            "batch.packing=bfd, or take weight and epochs away",
        )
    if batch.get("group_by_prefix") is True:
        if mixed:
            document.complain(
                ("batch", "group_by_prefix"),
                "gathers like documents, and weights or epochs of sources spread them evenly",
                "take one of the two away",
            )
        if data.get("shuffle") is False:
            document.complain(
                ("batch", "group_by_prefix"),
                "chooses the order of documents, and data.shuffle=false keeps that of the data",
                "take one of the two away",
            )


def _check_quantization(document: Document) -> None:
    model = _section(document, "model")
    if model.get("double_quantization") and model.get("quantization") not in ("nf4", "fp4"):
        document.complain(
            ("model", "double_quantization"),
            "is for the scales of nf4 and fp4",
            "add model.quantization=nf4, or take the key away",
        )


def _check_adapter(document: Document) -> None:
    adapter = _section(document, "adapter")
    kind = str(adapter.get("kind", "none"))
    if kind == "none" and adapter.get("continue_from"):
        return  # the kind is that of the adapter, and so is whatever else must agree with it
    for key, value in adapter.items():
        if value in (None, {}) or fits(key, kind):
            continue
        if kind == "none":
            document.complain(
                ("adapter", key),
                "has no effect while adapter.kind is none (all parameters are trained)",
                "add adapter.kind=lora, or take the key away",
            )
        elif kind in ALL:
            document.complain(
                ("adapter", key),
                f"has no effect on {kind}",
                f"it is for {', '.join(FITS[key])}",
            )
    if adapter.get("parameters") is not None and adapter.get("top_layers") is not None:
        document.complain(
            ("adapter", "top_layers"),
            "says what is trained, and so does adapter.parameters",
            "give one of the two",
        )


def _check_objective(document: Document) -> None:
    objective, device = _section(document, "objective"), _section(document, "device")
    name = str(objective.get("name", "nll"))
    for key, value in objective.items():
        if value is not None and unfit(key, name):
            document.complain(
                ("objective", key),
                f"is for {', '.join(BELONGS[key])}, and the objective is {name}",
                "take the key away, or name its objective",
            )
    if objective.get("scheduled_sampling"):
        if name == "psft":
            document.complain(
                ("objective", "scheduled_sampling"),
                "the ratio of psft compares probabilities in one context, and this changes it",
                "take one of the two away",
            )
        if device.get("share_prefixes") is True:
            document.complain(
                ("device", "share_prefixes"),
                "a guess put in for one row's target would be read by the rows that share it",
                "device.share_prefixes=auto, which is off with objective.scheduled_sampling",
            )


def _section(document: Document, name: str) -> dict[str, Any]:
    section = document.data.get(name)
    return cast("dict[str, Any]", section) if isinstance(section, dict) else {}
