"""One word, one meaning: names that were retired for the field's own words do not come back."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "src" / "tunesmith"

WORDS = {
    # the old word: what the field calls it
    "sharers": "model-parallel group", "sharer": "model-parallel rank",
    "seams": "tensor-parallel region", "parted": "sharded", "dealt": "assigned", "deal": "assign",
    "dealing": "load balancing", "asking": "peer check", "meeting": "rendezvous",
    "weightless": "zero weight", "locality": "attention window", "isolated": "unpacked",
    "isolate": "run unpacked", "strength": "gradient weight", "likeliest": "argmax",
    "slot": "parameter state", "slots": "parameter states", "bundle": "tensor group",
    "bundles": "tensor groups", "bundled": "grouped", "spread": "shard", "spared": "excluded",
    "ahead": "prefetch or planner", "again": "resume, retry or replay", "holders": "ranks per copy",
    "own": "local, where a rank's; else what it is", "termed": "partial gradient",
    "widen": "upcast",
}  # fmt: skip
"""Retired as any part of a name."""

NAMES = {
    "Ranks": "World", "Context": "ContextParallel", "Slice": "UlyssesShard",
    "Split": "TensorParallel", "Division": "TPPlan", "Divided": "TensorParallelSync",
    "Alone": "NoSync or AnswerOnly", "Replicated": "DataParallelSync", "Sharded": "FSDPSync",
    "Sharding": "FSDPOptions", "shard_model": "apply_fsdp", "Reduce": "GradSync",
    "OutOfMemoryTogether": "CollectiveOOM", "all_or_none": "all_ranks_or_none",
    "can_go_back": "can_retry", "own_plans": "local_plans", "own_part": "local_part",
    "Costs": "WorkModel", "StepOrder": "BatchSampler", "Due": "Trigger",
    "Stopping": "SignalHandler", "Background": "BackgroundWriter", "Saving": "CheckpointManager",
    "Standing": "Progress", "with_less_memory": "retry_on_oom", "leave_word": "write_hint",
    "take_word": "read_hint", "take_over": "saved_micro_tokens", "BaseModel": "ReferenceModel",
    "at_rest": "eval_mode", "OuterBatch": "OldPolicy", "Sides": "ObjectiveInputs",
    "Base": "ReferenceHidden", "Shares": "TargetOwners", "is_slow": "needs_upcast",
    "PerLayout": "LayoutCache", "ALONE": "SINGLE_WORLD, NO_SYNC or NO_GROUP", "is_line": "nothing",
    "COSTS": "WORK_MODEL", "WideLinear": "UpcastLinear", "Given": "UserObjects",
    "OwnObjective": "UserObjective", "spared_bytes": "sharded_savings",
    "share_model": "parallelize", "join_ranks": "make_groups", "fit_device": "choose_micro_batch",
    "let_go": "release", "answers_alone": "answers_without_prompt", "KnownFiles": "DigestCache",
    "Forked": "ForkedWorker", "room_for": "address_space_limit", "Clock": "TimeLimit",
    "TurnForm": "TurnPattern", "UNSAID": "nothing: old checkpoints are translated",
    "in_turn": "main_process_first", "copy_from_first": "broadcast_",
}  # fmt: skip
"""Retired as a whole name of a class, function or constant."""

EXEMPT = {("data/sampling/mixture.py", "in_turn"): "sources take turns in a mixture"}
"""Ordinary uses, with the reason."""


def parts(name: str) -> list[str]:
    """The words of a name: `_own_part` and `OwnPart` are own, part."""
    return [word.lower() for word in re.findall(r"[A-Z]?[a-z0-9]+|[A-Z]+(?![a-z])", name)]


def identifiers(tree: ast.AST) -> set[str]:
    """Names that the module defines: classes, functions, arguments, variables, attributes, and
    what it calls an import, an exception or a part of a pattern.
    """
    return {name for node in ast.walk(tree) if (name := _defined(node))}


def _defined(node: ast.AST) -> str | None:
    match node:
        case (
            ast.FunctionDef(name=name)
            | ast.AsyncFunctionDef(name=name)
            | ast.ClassDef(name=name)
            | ast.arg(arg=name)
            | ast.Name(id=name, ctx=ast.Store())
            | ast.Attribute(attr=name, ctx=ast.Store())
            | ast.alias(asname=name)
            | ast.ExceptHandler(name=name)
            | ast.MatchAs(name=name)
            | ast.MatchStar(name=name)
            | ast.MatchMapping(rest=name)
        ):
            return name
        case _:
            return None


def retired(path: str, names: set[str]) -> list[str]:
    """What is wrong with the names of a module."""
    found: list[str] = []
    for name in sorted(names):
        if (path, name.lstrip("_")) in EXEMPT:
            continue
        if name.lstrip("_") in NAMES:
            found.append(f"{path}: {name} is called {NAMES[name.lstrip('_')]}")
        for word in parts(name):
            if word in WORDS:
                found.append(f"{path}: {name} has {word}, the field says {WORDS[word]}")
    return found


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("class Sharers: ...", "Sharers"),
        ("def local(*, isolated=False): ...", "isolated"),
        ("async def ask_again(): ...", "ask_again"),
        ("dealt_to: int = 1", "dealt_to"),
        ("for path, own in (): ...", "own"),
        ("if (own_part := 1): ...", "own_part"),
        ("self._weightless = True", "_weightless"),
        ("import numpy as spread", "spread"),
        ("try: ...\nexcept OSError as again: ...", "again"),
        ("match 1:\n case ahead: ...", "ahead"),
        ("match 1:\n case [*dealt]: ...", "dealt"),
        ("match 1:\n case {**slots}: ...", "slots"),
        ("class PerLayout: ...", "PerLayout"),
    ],
)
def test_a_retired_word_is_found(text: str, name: str) -> None:
    found = retired("x.py", identifiers(ast.parse(text)))
    assert found
    assert all(f": {name} " in line for line in found)


def test_other_names_are_fine() -> None:
    text = "from x import isolated\nownership = spreadsheet = 1\nprint(own)\nlocal = x.own"
    assert retired("x.py", identifiers(ast.parse(text))) == []


def test_exemptions_are_in_use() -> None:
    for path, name in EXEMPT:
        names = identifiers(ast.parse((PACKAGE / path).read_text(encoding="utf-8")))
        used = {one for one in names if one.lstrip("_") == name}
        assert retired("elsewhere.py", used), path


@pytest.mark.parametrize("room", sorted({p.relative_to(PACKAGE).parts[0] for p in
                                         PACKAGE.rglob("*.py")}))  # fmt: skip
def test_no_retired_word_is_a_name(room: str) -> None:
    place = PACKAGE / room
    files = [place] if place.is_file() else sorted(place.rglob("*.py"))
    found: list[str] = []
    for file in files:
        path = file.relative_to(PACKAGE).as_posix()
        names = identifiers(ast.parse(file.read_text(encoding="utf-8")))
        found += retired(path, names | {part.removesuffix(".py") for part in path.split("/")})
    assert found == []
