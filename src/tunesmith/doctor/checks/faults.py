"""Check of rows that rendering refuses, by reason."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from tunesmith.data import row_errors
from tunesmith.doctor.corpus import ASSISTANT, Case, Corpus, Setup
from tunesmith.doctor.outcome import Hit, Level, Outcome

READING = frozenset({"invalid-json", "invalid-encoding", "invalid-csv", "broken-text"})
SHAPE = frozenset(
    {
        "wrong-type",
        "missing-column",
        "unknown-format",
        "mixed-format",
        "unknown-role",
        "empty-messages",
        "empty-text",
        "conflicting-wishes",
        "no-completion",
    }
)
UNREAD = frozenset({row_errors.UNREAD})
ROLES = frozenset({"template-refused"})
DROPPED = frozenset({"dropped-content", "null-content"})
SPECIAL = frozenset({"special-token-in-content"})
STOPS = frozenset({"no-stop-token", "text-after-stop"})
TARGETS = frozenset({"generation-prompt-mismatch", "rewritten-history"})
EMPTY = frozenset({"empty-answer"})
TEMPLATE = frozenset({"no-chat-template"})
KNOWN = READING | SHAPE | UNREAD | ROLES | DROPPED | SPECIAL | STOPS | TARGETS | EMPTY | TEMPLATE
_OF_TOOLS = ".tool_calls"


def fault_hits(cases: Iterable[Case], kinds: frozenset[str]) -> list[Hit]:
    """The rows with a fault of these kinds; faults of tool calls belong to the check of tools."""
    return [
        Hit(str(case.origin), case.fault.message)
        for case in cases
        if case.fault is not None and case.fault.kind in kinds and not of_tools(case)
    ]


def of_tools(case: Case) -> bool:
    """True if the row can't be read because of how it writes a tool call."""
    fault = case.fault
    return fault is not None and fault.kind == "wrong-type" and _OF_TOOLS in fault.message


def refusal(setup: Setup) -> Level:
    """How bad a row is that can't be trained on: a run stops at it unless told to drop it."""
    return "error" if setup.bad_rows == "error" else "warning"


def of_kinds(kinds: frozenset[str], hint: str) -> Callable[[Corpus, Setup], Outcome]:
    """The check for rows with these faults and no others."""

    def check(corpus: Corpus, setup: Setup) -> Outcome:
        hits = fault_hits(corpus.cases, kinds)
        return Outcome(hits, len(corpus.cases), "rows", refusal(setup), hint)

    return check


def unread_fields(corpus: Corpus, setup: Setup) -> Outcome:
    """Fields that hold something and that nothing reads: an error where they look like input or
    like a wish, else for information.
    """
    found: dict[tuple[str, str], list[str]] = {}
    refused: dict[str, str] = {}
    for case in corpus.cases:
        for field in case.fields:
            if field.state in ("unread", "refused"):
                found.setdefault((field.state, field.path), []).append(str(case.origin))
                refused.update({field.path: field.hint} if field.state == "refused" else {})
    hits = [
        Hit(rows[0], f"`{path}` holds something that nothing reads ({len(rows):,} rows)")
        for (_, path), rows in sorted(found.items())
    ]
    names = ", ".join(dict.fromkeys(path.rpartition(".")[2] for _, path in found))
    hint = "; ".join(dict.fromkeys(refused.values())) or f"data.ignore_fields=[{names}]"
    return Outcome(hits, len(corpus.cases), "rows", "error" if refused else "info", hint)


def renamed_fields(corpus: Corpus, setup: Setup) -> Outcome:
    """Fields and roles in another trainer's spelling, and what they are read as."""
    found: dict[row_errors.Field, list[str]] = {}
    for case in corpus.cases:
        for field in case.fields:
            if field.state == "mapped":
                found.setdefault(field, []).append(str(case.origin))
    hits = [
        Hit(rows[0], f"`{field.path}` is read as {field.hint} ({len(rows):,} rows)")
        for field, rows in found.items()
    ]
    hint = "if that is not meant: data.roles or data.ignore_fields"
    return Outcome(hits, len(corpus.cases), "rows", "info", hint)


def other_faults(corpus: Corpus, setup: Setup) -> Outcome:
    """Faults of a kind that no other check is about."""
    hits = [
        Hit(str(case.origin), f"{case.fault.kind}: {case.fault.message}")
        for case in corpus.cases
        if case.fault is not None and case.fault.kind not in KNOWN
    ]
    hint = "mend the rows, or data.bad_rows=drop leaves them out"
    return Outcome(hits, len(corpus.cases), "rows", refusal(setup), hint)


def role_order(corpus: Corpus, setup: Setup) -> Outcome:
    """Chats that the template refuses, or whose turns don't follow each other as in use.

    In use the system speaks first, a user or a tool before each answer, and a tool only when
    called.
    """
    refused = fault_hits(corpus.cases, ROLES)
    odd = [
        Hit(str(case.origin), reason)
        for case in corpus.cases
        if case.fault is None and (reason := _odd_turn([m.role for m in case.messages]))
    ]
    level: Level = refusal(setup) if refused else "warning"
    hint = "put the turns in order or merge neighbours of one role: an answer follows a question"
    return Outcome([*refused, *odd], len(corpus.cases), "rows", level, hint)


def _odd_turn(roles: list[str]) -> str | None:
    for number, role in enumerate(roles):
        before = roles[number - 1] if number else None
        place = f"message {number} ({role})"
        if role in ("system", "developer") and before not in (None, "system", "developer"):
            return f"{place} comes after {before}"
        if role == "user" and before == "user":
            return f"{place} follows another user turn"
        if role == ASSISTANT and before in (ASSISTANT, "system", "developer"):
            return f"{place} follows {before}, so nothing asks for it"
        if role == "tool" and before not in (ASSISTANT, "tool"):
            return f"{place} follows {before}, which calls no tool"
    return None
