"""The batch sampler of a run: packing, mixtures, shuffling, and how often each source is seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunesmith.build.sources import is_mixture
from tunesmith.config.schema import Holdout, Recipe, SourceSection
from tunesmith.data.packing.packs import WRAPPED, Packing, make_packs
from tunesmith.data.preprocess.document_store import source_numbers, token_counts
from tunesmith.data.preprocess.prepare import Prepared
from tunesmith.data.sampling.mixture import Portion, mix
from tunesmith.data.sampling.prefix_groups import PrefixGroups
from tunesmith.data.sampling.sampler import BatchSampler
from tunesmith.data.sources.sources import Source
from tunesmith.data.templates.select import BUILT_IN
from tunesmith.errors import DataError, RecipeError
from tunesmith.types import Document, IntArray


@dataclass(frozen=True, slots=True)
class Steps:
    """Which documents each step learns from, how many steps there are, and what to say of them."""

    sampler: BatchSampler
    total: int
    notes: list[str]


def pack_prepared(
    recipe: Recipe, prepared: Prepared, *, max_length: int | None = None
) -> Packing | None:
    """Cut or join the prepared documents as `batch.packing` says; None where it says none.

    `max_length` bounds a pack of `wrapped`, which is one path; packs of documents that don't see
    each other may be longer.

    Raises:
        DataError: they can't be packed as asked.
    """
    batch = recipe.batch
    if batch.packing == "none":
        return None
    capacity = pack_length(recipe)
    if batch.packing == WRAPPED and max_length is not None and capacity > max_length:
        raise RecipeError(
            f"a pack of wrapped is one path of {capacity} tokens, and data.max_length is "
            f"{max_length}",
            where="batch.pack_tokens",
            hint=f"batch.pack_tokens={max_length} at most",
        )
    packing = make_packs(prepared, kind=batch.packing, capacity=capacity)
    if packing.cut and batch.packing == "bfd_split" and is_mixture(recipe.data.train):
        raise DataError(
            f"{packing.cut:,} documents are longer than a pack of {capacity} tokens, and their "
            "pieces have no place in a mixture, which counts documents",
            where="batch.packing",
            hint="larger packs with batch.pack_tokens, or data.max_length and data.too_long=drop",
        )
    return packing


def pack_length(recipe: Recipe) -> int:
    """Tokens of a pack: `batch.pack_tokens`, else `data.max_length`."""
    found = recipe.batch.pack_tokens or recipe.data.max_length
    if isinstance(found, str):
        raise RecipeError(
            "needs the tokens of a pack", where="batch.packing", hint="batch.pack_tokens=2048"
        )
    return found


def plan_steps(
    recipe: Recipe,
    prepared: Prepared,
    sources: Sequence[Source],
    packing: Packing | None = None,
) -> Steps:
    """The steps of a run over prepared documents; the plan is entered in their ledger."""
    lengths = token_counts(prepared.documents)
    sections = _sections(prepared.documents, sources)
    written = recipe.data.train if any(source.path for source in sources) else []
    order = make_sampler(
        recipe, written, lengths=lengths, sections=sections, documents=prepared.documents
    )
    total = recipe.train.steps or order.total_steps(recipe.train.epochs or 3)
    visits = order.visits(total)
    if packing is not None:
        # The plan speaks of rows: of one in pieces, the first stands for it.
        visits = np.where(packing.first < 0, 0, visits[packing.first])
        lengths, sections = token_counts(packing.given), _sections(packing.given, sources)
    plan = _plan(written, visits, lengths=lengths, sections=sections)
    if any(section.weight is not None for section in written):
        plan.update(mix_by=recipe.data.mix_by, mix_stop=recipe.data.mix_stop)
    plan["steps"] = total
    for entry, number in zip(plan["sources"], np.unique(sections), strict=True):
        inside = [source for source in sources if source.section == number]
        entry["files"] = len(inside)
        entry["commit"] = inside[0].commit
        if entry["source"] is None:
            entry["source"] = inside[0].name
    notes = [plan_line(plan)] if is_mixture(written) else []
    if packing is not None:
        plan["packing"] = packing_record(packing, prepared.documents, order)
        notes.append(packing_line(plan["packing"]))
    prepared.ledger.plan = plan
    return Steps(order, total, notes)


def _sections(documents: Sequence[Document], sources: Sequence[Source]) -> IntArray:
    """For each document the number of the section of data.train that it is from."""
    names, numbers = source_numbers(documents)
    section_of = {source.name: source.section for source in sources}
    return np.array([section_of[name] for name in names], np.int32)[numbers]


def make_sampler(
    recipe: Recipe,
    written: Sequence[SourceSection],
    *,
    lengths: Sequence[int] | IntArray,
    sections: Sequence[int] | IntArray,
    documents: Sequence[Document] = (),
) -> BatchSampler:
    """The order of documents with `lengths` tokens, each from the source of `written` that
    `sections` numbers; `documents` themselves are looked at to group them by prefix.

    Raises:
        DataError: the sources can't be mixed as asked.
    """
    seed, shuffle = recipe.train.seed, recipe.data.shuffle
    mixture = None
    if is_mixture(written):
        tokens = np.asarray(lengths, np.int64)
        portions: list[Portion] = []
        for number, section in enumerate(written):
            chosen = np.flatnonzero(np.asarray(sections) == number).astype(np.int32)
            portions.append(
                Portion(
                    label(section),
                    chosen,
                    tokens=int(tokens[chosen].sum()),
                    weight=section.weight,
                    epochs=section.epochs or 1.0,
                )
            )
        data = recipe.data
        mixture = mix(portions, by=data.mix_by, stop=data.mix_stop, seed=seed, shuffle=shuffle)
    batch = recipe.batch
    whole = batch.packing not in ("none", WRAPPED)
    return BatchSampler(
        lengths,
        documents=None if batch.tokens else batch.documents,
        tokens=batch.tokens,
        pack_tokens=pack_length(recipe) if whole else None,
        groups=PrefixGroups(documents) if batch.group_by_prefix else None,
        seed=seed,
        shuffle=shuffle,
        mixture=mixture,
    )


def label(section: SourceSection) -> str:
    """A source as the user knows it: its path, with subset and split where they are given."""
    chosen = [part for part in (section.subset, section.split) if part is not None]
    return f"{section.path} ({', '.join(chosen)})" if chosen else section.path


def _plan(
    written: Sequence[SourceSection],
    visits: NDArray[np.int64],
    *,
    lengths: IntArray,
    sections: IntArray,
) -> dict[str, Any]:
    """How often the run sees each source of the recipe, in documents and tokens."""
    tokens = np.asarray(lengths, np.int64)
    entries: list[dict[str, Any]] = []
    for number in np.unique(sections).tolist():
        mine = np.flatnonzero(np.asarray(sections) == number)
        section = written[number] if written else None
        seen = visits[mine]
        entries.append(
            {
                "source": label(section) if section else None,
                "weight": section.weight if section else None,
                "documents": len(mine),
                "tokens": int(tokens[mine].sum()),
                "visits": int(seen.sum()),
                "passes": round(int(seen.sum()) / len(mine), 6),
                "never_seen": int((seen == 0).sum()),
                "share_of_documents": round(int(seen.sum()) / max(1, int(visits.sum())), 6),
                "share_of_tokens": round(
                    int((seen * tokens[mine]).sum()) / max(1, int((visits * tokens).sum())), 6
                ),
            }
        )
    return {"sources": entries}


def plan_line(plan: Mapping[str, Any]) -> str:
    """The mixture in one line: for each source its share, its passes, and what is left out."""
    what = "tokens" if plan.get("mix_by") == "tokens" else "documents"
    parts: list[str] = []
    for entry in plan["sources"]:
        missing = f", {entry['never_seen']:,} never" if entry["never_seen"] else ""
        parts.append(
            f"{entry['source']} {entry[f'share_of_{what}']:.1%} of {what}, "
            f"seen {entry['passes']:.3g} times{missing}"
        )
    return f"mix: {'; '.join(parts)}"


def packing_record(
    packing: Packing, documents: Sequence[Document], sampler: BatchSampler
) -> dict[str, Any]:
    """Packs, how full they are, and what was cut, in plain values."""
    packs = sampler.packs(0)
    tokens = int(token_counts(documents).sum())
    count = len(documents) if packs is None else len(packs)
    room = max(1, count * packing.capacity)
    return {
        "kind": packing.kind,
        "pack_tokens": packing.capacity,
        "documents": len(packing.given),
        "pieces": len(documents) if packs is not None else None,
        "packs": count,
        "fill": round(tokens / room if packs is None else packs.fill, 6),
        "rows_cut": packing.cut,
        "tokens_lost": packing.lost,
        "targets_lost": packing.unlearned,
        "targets_gained": packing.learned,
    }


def packing_line(record: Mapping[str, Any]) -> str:
    """The packs in one line, with what was cut."""
    line = (
        f"packing: {record['kind']}, {record['documents']:,} documents in {record['packs']:,} "
        f"packs of {record['pack_tokens']:,} tokens, {record['fill']:.2%} full"
    )
    if record["rows_cut"]:
        line += (
            f"; {record['rows_cut']:,} documents cut, {record['tokens_lost']:,} tokens and "
            f"{record['targets_lost']:,} targets lost"
        )
    return line


def pin_revisions(
    recipe: Recipe,
    sources: Sequence[Source],
    held_out: Mapping[str, Sequence[Source]] | Holdout | None,
) -> Recipe:
    """The recipe with the commit of each hub data set as its revision, and with a chat template of
    this machine under its whole path, so that it can be run from another folder.
    """
    changes: dict[str, Any] = {}
    if recipe.data.template is not None:
        path = Path(recipe.data.template).expanduser()
        if recipe.data.template not in BUILT_IN and path.exists():
            changes["template"] = str(path.resolve())
    if any(source.commit for source in sources):
        changes["train"] = _pinned(recipe.data.train, sources)
    if isinstance(held_out, Mapping) and isinstance(recipe.data.eval, dict):
        changes["eval"] = {
            name: _pinned(sections, held_out[name]) for name, sections in recipe.data.eval.items()
        }
    data = recipe.data.model_copy(update=changes)
    return recipe.model_copy(update={"data": data})


def _pinned(sections: Sequence[SourceSection], sources: Sequence[Source]) -> list[SourceSection]:
    commits = {source.section: source.commit for source in sources if source.commit is not None}
    return [
        section.model_copy(update={"revision": commits[number]}) if number in commits else section
        for number, section in enumerate(sections)
    ]
