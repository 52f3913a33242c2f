"""Names of columns, message fields and roles: what each format reads, the known spellings of other
trainers, and names that look like input or like a wish about training.

This is the one table that reading, preprocessing, `doctor` and `plan` share. A name that is in no
part of it is of no consequence for training, and is only mentioned.
"""

from __future__ import annotations

COMMON = ("system", "tools", "chat_template_kwargs")
"""Columns that any chat format may have."""

FORMATS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "tokens": ("input_ids",),
    "segments": ("segments",),
    "preference": ("chosen", "rejected"),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
    "templated_text": ("text",),
}
"""Format to the columns it needs, in the order in which `detect_format` looks for them."""

MASKS = ("completion_mask", "assistant_masks", "loss_mask")

COLUMNS: dict[str, tuple[str, ...]] = {
    "messages": ("messages", *COMMON),
    "sharegpt": ("conversations", *COMMON),
    "tokens": ("input_ids", "labels", "weights", "attention_mask", *MASKS),
    "segments": ("segments",),
    "preference": ("prompt", "chosen", "rejected", *COMMON),
    "prompt_completion": ("prompt", "completion", *COMMON),
    "alpaca": ("instruction", "input", "output", "history", *COMMON),
    "text": ("text",),
    "templated_text": ("text",),
}
"""Format to every column that a row of it is read from, those it can do without included."""

MESSAGE_COLUMNS = ("messages", "conversations", "prompt", "completion", "chosen", "rejected")
"""Columns that may hold a list of messages."""

STANDARD_ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})
ROLE_NAMES: dict[str, str] = {
    "human": "user",
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "bot", "ai", "model"), "assistant"),
    "function": "tool",
}
"""Names of roles in other formats that can mean one role only."""

SPELLINGS: dict[str, str] = {
    "loss": "train",
    "training": "train",
    "loss_weight": "weight",
    "loss_scale": "weight",
    "function_call": "tool_calls",
}
"""Fields of a message in other trainers' spelling, and ours."""

REASONING = ("reasoning_content", "reasoning", "thinking")
"""Fields of a message that hold its reasoning as text."""

MESSAGE_READ = frozenset({"role", "content", "train", "weight", "tool_calls", "tool_call_id"})
"""Fields of a message that are read without the template's help. `tool_call_id` says which call a
result belongs to; `doctor` reads it.
"""
PART_READ = frozenset({"type", "text"})
SEGMENT_READ = frozenset({"text", "train", "label"})

_WISHES = (
    "train", "training", "trainable", "learn", "train_on", "train_detail",
    "loss", "loss_weight", "loss_scale", "loss_mask", "loss_weights",
    "weight", "weights", "sample_weight", "mask", "label", "labels",
)  # fmt: skip
_INPUT = (
    "system", "system_prompt", "system_message", "context", "documents", "history", "input",
    "tools", "functions", "tool_defs", "available_tools", "tool_calls", "function_call",
    "refusal", "audio", "audios", "image", "images", "video", "videos",
    *REASONING, "reasoning_details", "thinking_blocks", "thoughts", "chain_of_thought",
    "chat_template_kwargs",
)  # fmt: skip
REFUSED = frozenset({*_WISHES, *_INPUT})
"""Names that look like input or like a wish: where nothing reads them, the row is refused."""

PLAIN_TEXT_LABELS = frozenset({"label", "labels"})
"""Columns of classified texts, of no consequence where the text is learned as a whole."""

MEANT: dict[str, str] = {
    "functions": "tools",
    "tool_defs": "tools",
    "available_tools": "tools",
    "system_prompt": "system",
    "system_message": "system",
}
"""Columns that `data.columns` maps to one of ours."""

COLUMN_TARGETS = ("system", "tools", "chat_template_kwargs")
TOKEN_TARGETS = ("labels", "weights", *MASKS)
FIELD_TARGETS = ("train", "weight", "tool_calls", "reasoning_content")
"""Our own names, of which others may be misspellings."""
NOT_MISSPELT = frozenset({"height", "brain", "grain", "tool_call_id"})
"""Words of their own, although one letter away from a name of ours."""
