"""Every text-generating family of transformers, tiny, as a user's folder: how it runs, and what the
lines of `verify` on layouts and exports say after full training and with LoRA.

    python benchmarks/families.py [FAMILY ...] [--results FILE.md] [--load-only]

Each family is made with random weights in the class that its config.json names, with a tensor that
no module reads, and then loaded, self-tested, trained, exported and read again. The judges are
plain transformers and peft; nothing is downloaded. The table says of each family whether it is
packed with shared prefixes, runs one path at a time, or is refused, and why.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from small_configs import small_config

from tunesmith.config.read import read_recipe
from tunesmith.errors import TunesmithError
from tunesmith.model.load import load_causal_lm, resolve_model
from tunesmith.model.selftest import self_test
from tunesmith.verify.exported import Exported, same_logits, write
from tunesmith.verify.layouts import Layouts, layout_checks
from tunesmith.verify.resumed import run_through
from tunesmith.verify.whole import checkpoint_lines
from tunesmith.verify.workload import Bounds, build_precise, chosen_documents

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from tiny import chat_rows, tiny_tokenizer, write_jsonl

RESULTS = Path(__file__).resolve().parent / "results" / "families.md"
MAPPINGS = (
    "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
)  # fmt: skip
UNREAD = "mtp.layers.0.up_proj.weight"
BOUNDS = Bounds(documents=2, rows=6)
LONGEST = 100
SHOWN = 160


@dataclass(frozen=True, slots=True)
class Row:
    """What was found of one family."""

    family: str
    class_name: str
    runs: str  # packed, unpacked, refused, not made here
    why: str = ""
    full: str = ""  # verdict of `verify` after full training
    lora: str = ""
    tensors: int = 0  # of the base's files, all of which are in the result


def families() -> dict[str, str]:
    """The class of each model type that writes text; a wrapper's comes before its text part's."""
    from transformers.models.auto import modeling_auto

    found: dict[str, str] = {}
    for mapping in MAPPINGS:
        for family, names in getattr(modeling_auto, mapping, {}).items():
            found.setdefault(family, names if isinstance(names, str) else names[0])
    return dict(sorted(found.items()))


def make(family: str, class_name: str, folder: Path) -> None:
    """A folder as the hub has it, with weights large enough that errors show."""
    torch.manual_seed(0)
    model = getattr(transformers, class_name)(small_config(family))
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.08)
        elif "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    weights = folder / "model.safetensors"
    tensors = {**load_file(weights), UNREAD: torch.randn(8, 8).to(torch.bfloat16)}
    save_file(tensors, weights, metadata={"format": "pt"})


def examine(family: str, class_name: str, *, load_only: bool) -> Row:
    """One family from its configuration to its exported folders."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        try:
            make(family, class_name, folder)
        except Exception as error:  # whatever a model class raises at small sizes
            return Row(family, class_name, "not made here", _short(error))
        try:
            model = load_causal_lm(resolve_model(str(folder)), dtype="float32").model
            tested = self_test(model, max_length=LONGEST)
        except TunesmithError as error:
            return Row(family, class_name, "refused", error.message[:SHOWN])
        runs = "unpacked" if tested.unpacked else "packed"
        why = " ".join(note for note in tested.notes if "one path" in note)[:SHOWN]
        if load_only:
            return Row(family, class_name, runs, why)
        rows = write_jsonl(Path(place) / "rows.jsonl", chat_rows(8))
        full, tensors = _verified(folder, rows, "none")
        lora, _ = _verified(folder, rows, "lora")
        return Row(family, class_name, runs, why, full, lora, tensors)


def _verified(folder: Path, rows: Path, kind: str) -> tuple[str, int]:
    """The verdict of `verify`'s lines on layouts and exports in words, and how many tensors of the
    base were found in the result.
    """
    recipe = {
        "model": {"name": str(folder), "dtype": "float32"},
        "data": {"train": [str(rows)], "shuffle": False},
        "optim": {"lr": 1e-3, "weight_decay": 0.1},
        "adapter": {"kind": kind},
    }
    try:
        job, precision = build_precise(read_recipe(recipe), BOUNDS, [])
        documents = chosen_documents(job, BOUNDS)
        outcomes = layout_checks(Layouts(job, documents, precision))
        run_through(job, rows.parent / f"run-{kind}")
        result = rows.parent / f"result-{kind}"
        write(job, result)
        subject = Exported(job, result, "the result")
        outcomes += [same_logits(subject, documents), *checkpoint_lines(subject, documents)]
    except TunesmithError as error:
        return f"refused: {error.message}"[:SHOWN], 0
    failed = [f"{o.promise} {o.name}" for o in outcomes if o.failed]
    whole = next((o for o in outcomes if o.name == "whole checkpoint"), None)
    tensors = 0 if whole is None or whole.failed else whole.counts["tensors"]
    return (f"fails: {', '.join(failed)}" if failed else "holds"), tensors


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}"[:SHOWN]


def table(rows: Sequence[Row]) -> str:
    """The rows as a page."""
    counts = {kind: sum(row.runs == kind for row in rows) for kind in ("packed", "unpacked")}
    lines = [
        f"# {len(rows)} families of transformers {transformers.__version__}",
        "",
        f"{counts['packed']} packed with shared prefixes, {counts['unpacked']} one path at a time.",
        "",
        "| family | class | runs | full | LoRA | tensors | why |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        why = row.why.replace("|", "\\|").replace("\n", " ")
        cells = (row.family, row.class_name, row.runs, row.full, row.lora, row.tensors or "", why)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", help="model types; all if none is named")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--load-only", action="store_true", help="load and self-test, no more")
    given = parser.parse_args(arguments)
    known = families()
    unknown = [name for name in given.families if name not in known]
    if unknown:
        raise SystemExit(f"error: transformers has no text-generating family {unknown[0]}")
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    rows: list[Row] = []
    for name in given.families or known:
        try:
            row = examine(name, known[name], load_only=given.load_only)
        except Exception as error:  # a fault of ours, which the table must show
            row = Row(name, known[name], "traceback", _short(error))
        rows.append(row)
        print(row.family, row.runs, row.full, row.lora, row.why, sep="\t", flush=True)
    given.results.parent.mkdir(parents=True, exist_ok=True)
    given.results.write_text(table(rows), encoding="utf-8")
    records: list[dict[str, Any]] = [asdict(row) for row in rows]
    given.results.with_suffix(".json").write_text(json.dumps(records, indent=1) + "\n")
    return (
        1 if any("fails" in row.full + row.lora or row.runs == "traceback" for row in rows) else 0
    )


if __name__ == "__main__":
    sys.exit(main())
