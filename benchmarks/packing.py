"""Packs of documents, Tunesmith and TRL in turn: time, fill, and that both make the same packs.

    python benchmarks/packing.py --model MODEL --gsm8k train.jsonl --oasst messages.jsonl
    python benchmarks/packing.py --counts 20000 --rounds 2       # a quick look, log-normal alone

Lengths are drawn with replacement from those of the given rows under the model's template, and from
log-normal distributions. Tunesmith packs lengths. TRL's `_pack_bfd` packs a table of token lists;
here a token is a byte, so that moving tokens costs it as little as can be, and all rows are one
batch, which is its best fill. `pack_dataset` is TRL as its trainer calls it, a thousand rows at a
time, on the smallest count alone. Each round runs one after the other in one process. Writes
results/packing.json and .md.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tunesmith.data.packing.strategies import Packs, best_fit

RESULTS = Path(__file__).resolve().parent / "results"
COUNTS = (200_000, 1_000_000)
LOG_NORMAL = ((5.5, 0.8, 2048), (6.5, 1.0, 4096))


def row_lengths(model: str, path: Path, columns: dict[str, str] | None) -> np.ndarray:
    """Tokens of the rows of a file, as a run would have them."""
    from tunesmith.data.preprocess.document_store import token_counts
    from tunesmith.data.preprocess.prepare import prepare
    from tunesmith.data.sources.sources import Source
    from tunesmith.data.templates.load import load_template

    source = Source(path.name, path=path, columns=columns)
    prepared = prepare([source], load_template(model), max_length=None, bad_rows="drop")
    return np.asarray(token_counts(prepared.documents), np.int64)


def cases(arguments: argparse.Namespace) -> list[tuple[str, int, Callable[[int], np.ndarray]]]:
    """Name, tokens of a pack, and a function that draws so many lengths."""
    found: list[tuple[str, int, Callable[[int], np.ndarray]]] = []
    given = [
        ("GSM8K", arguments.gsm8k, {"prompt": "question", "completion": "answer"}),
        ("oasst", arguments.oasst, None),
    ]
    for name, path, columns in given:
        if path is not None:
            real = row_lengths(arguments.model, path, columns)
            found.append((name, 2048, _drawn_from(real)))
    for mean, sigma, capacity in LOG_NORMAL:
        found.append((f"log-normal({mean}, {sigma})", capacity, _log_normal(mean, sigma)))
    return found


def _drawn_from(real: np.ndarray) -> Callable[[int], np.ndarray]:
    return lambda count: np.random.default_rng(0).choice(real, count)


def _log_normal(mean: float, sigma: float) -> Callable[[int], np.ndarray]:
    return lambda count: np.maximum(
        np.random.default_rng(0).lognormal(mean, sigma, count).astype(np.int64), 1
    )


def token_table(lengths: np.ndarray) -> Any:
    """A pyarrow table with a list of bytes for each length."""
    import pyarrow as pa

    offsets = np.concatenate([[0], np.cumsum(lengths)])
    values = pa.array(np.zeros(int(offsets[-1]), np.int8))
    return pa.table({"input_ids": pa.LargeListArray.from_arrays(pa.array(offsets), values)})


def trl_packs(lengths: np.ndarray, capacity: int) -> tuple[float, list[int], int]:
    """Seconds, lengths in the order of TRL's packs, and how many packs."""
    from trl.data_utils import _pack_bfd

    table = token_table(lengths)
    begin = time.perf_counter()
    packed = _pack_bfd(table, capacity, "truncate")
    seconds = time.perf_counter() - begin
    inside = packed["seq_lengths"].combine_chunks()
    return seconds, inside.flatten().to_numpy(zero_copy_only=False), len(packed)


def trl_dataset(lengths: np.ndarray, capacity: int) -> tuple[float, int]:
    """Seconds and packs of `pack_dataset` with its defaults."""
    import datasets
    from trl import pack_dataset

    datasets.disable_progress_bars()
    datasets.disable_caching()
    table = datasets.Dataset(datasets.table.InMemoryTable(token_table(lengths)))
    begin = time.perf_counter()
    packed = pack_dataset(table, seq_length=capacity, strategy="bfd")
    return time.perf_counter() - begin, len(packed)


def our_packs(lengths: np.ndarray, capacity: int) -> tuple[float, Packs]:
    """Seconds and packs."""
    begin = time.perf_counter()
    packs = best_fit(np.minimum(lengths, capacity), capacity)
    return time.perf_counter() - begin, packs


def measure(name: str, lengths: np.ndarray, capacity: int, *, rounds: int, dataset: bool) -> dict:
    """One distribution at one count."""
    kept = np.minimum(lengths, capacity)
    total = int(kept.sum())
    ours, theirs, ratios, trained = [], [], [], []
    packs = same = trl_count = dataset_count = None
    for _ in range(rounds):
        seconds, packs = our_packs(lengths, capacity)
        peer, inside, trl_count = trl_packs(lengths, capacity)
        same = trl_count == len(packs) and np.array_equal(inside, kept[packs.items])
        ours.append(seconds)
        theirs.append(peer)
        ratios.append(peer / seconds)
        if dataset:
            spent, dataset_count = trl_dataset(lengths, capacity)
            trained.append(spent)
    assert packs is not None
    assert trl_count is not None
    return {
        "lengths": name,
        "count": len(lengths),
        "pack_tokens": capacity,
        "tokens": total,
        "seconds": ours,
        "trl_seconds": theirs,
        "ratio": [min(ratios), statistics.median(ratios), max(ratios)],
        "packs": len(packs),
        "fill": packs.fill,
        "trl_packs": trl_count,
        "trl_fill": total / (trl_count * capacity),
        "same_packs": bool(same),
        "most_possible": total / (-(-total // capacity) * capacity),
        "trl_dataset_seconds": trained or None,
        "trl_dataset_fill": total / (dataset_count * capacity) if dataset_count else None,
    }


def table(records: list[dict[str, Any]]) -> str:
    """The records as Markdown."""
    head = (
        "| lengths | count | pack | Tunesmith s | TRL s | ratio, min-median-max | fill "
        "| TRL's fill | most possible | same packs | `pack_dataset` s | its fill |\n"
        + "|---" * 12
        + "|\n"
    )
    lines = []
    for one in records:
        low, middle, high = one["ratio"]
        spent = one["trl_dataset_seconds"]
        lines.append(
            f"| {one['lengths']} | {one['count']:,} | {one['pack_tokens']} "
            f"| {statistics.median(one['seconds']):.3f} "
            f"| {statistics.median(one['trl_seconds']):.2f} "
            f"| {low:.0f} - {middle:.0f} - {high:.0f} | {one['fill']:.3%} | {one['trl_fill']:.3%} "
            f"| {one['most_possible']:.3%} | {'yes' if one['same_packs'] else 'no'} "
            f"| {f'{statistics.median(spent):.1f}' if spent else ''} "
            f"| {'' if one['trl_dataset_fill'] is None else format(one['trl_dataset_fill'], '.3%')}"
            " |"
        )
    return head + "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="folder of a model, for its tokenizer and template")
    parser.add_argument("--gsm8k", type=Path)
    parser.add_argument("--oasst", type=Path)
    parser.add_argument("--counts", type=int, nargs="+", default=list(COUNTS))
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    import trl

    records = []
    for name, capacity, draw in cases(arguments):
        for count in arguments.counts:
            record = measure(
                name, draw(count), capacity, rounds=arguments.rounds,
                dataset=count == min(arguments.counts),
            )  # fmt: skip
            records.append(record)
            print(table([record]).splitlines()[-1], flush=True)
    found = {"machine": platform.platform(), "trl": trl.__version__, "cases": records}
    if arguments.counts == list(COUNTS):
        (RESULTS / "packing.json").write_text(json.dumps(found, indent=1) + "\n")
        page = f"# Packing, against TRL {trl.__version__}\n\n{table(records)}"
        (RESULTS / "packing.md").write_text(page)


if __name__ == "__main__":
    main()
