"""A corpus with one of every fault, made from a seed, and which rows have which fault.

Clean rows are random sentences. Planted rows are written so that each shows exactly the faults it
is listed under; the template takes arguments that make it misbehave for one row.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tiny import tiny_tokenizer

TEMPLATE = (
    "{% if double_bos %}<s><s>{% endif %}"
    "{% if tools %}<tools>{{ tools | tojson }}</tools>\n{% endif %}"
    "{% for m in messages %}"
    "<|im_start|>{{ m.role }}\n{% if unknown %}<unk>{% endif %}"
    "{% if m.role == 'assistant' and lead %}{{ lead }}{% endif %}"
    "{% if m.role == 'assistant' and rewrite and not loop.last %}(earlier) {% endif %}"
    "{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}<call>{{ call.function | tojson }}</call>{% endfor %}"
    "{% if not (open and m.role == 'assistant') %}<|im_end|>{% endif %}\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if unknown %}<unk>{% endif %}"
    "{% if lead %}{{ lead }}{% endif %}{% if think %}<think>\n{% endif %}{% endif %}"
)
CONTEXT = 2048
_WORDS = """
river stone evening light forest fox dog lazy quick brown capital france paris answer number
name city unit weather oslo short poem write please function type object system content green
apple table window garden music letter doctor engine bridge winter summer market price water
mountain valley cloud paper pencil teacher school train station ticket coffee sugar bread butter
island harbour captain sailor wind storm morning candle mirror blanket kettle carpet drawer
ladder hammer needle thread button pocket wallet jacket trousers shoes hat
"""
WORDS = tuple(_WORDS.split())
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "days": {"type": "integer"},
                "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
            },
            "required": ["city"],
        },
    },
}


@dataclass
class Planted:
    """Lines of the two files, and by check the rows it must find, and no others."""

    train: list[str] = field(default_factory=list)
    held_out: list[str] = field(default_factory=list)
    expected: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))

    def add(self, row: dict[str, Any] | str, *checks: str, held_out: bool = False) -> None:
        """Append a row (or a raw line) that these checks must find."""
        lines, name = (self.held_out, "eval") if held_out else (self.train, "train")
        for check in checks:
            self.expected[check].add(f"{name}:{len(lines)}")
        lines.append(row if isinstance(row, str) else json.dumps(row, ensure_ascii=False))


class Writer:
    """Random sentences and rows of them."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def words(self, count: int) -> str:
        """So many random words."""
        return " ".join(self.random.choice(WORDS) for _ in range(count))

    def text(self) -> str:
        """A sentence of the usual length."""
        return f"{self.words(self.random.randint(18, 40)).capitalize()}."

    def turns(self, *contents: str) -> list[dict[str, Any]]:
        """User and assistant in turn."""
        roles = ("user", "assistant")
        return [{"role": roles[at % 2], "content": text} for at, text in enumerate(contents)]

    def row(self, question: str | None = None, answer: str | None = None, **more: Any) -> dict:
        """A chat of one question and one answer; what is not given is random."""
        asked = self.text() if question is None else question
        said = self.text() if answer is None else answer
        return {"messages": self.turns(asked, said), **more}


def clean_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Rows without any fault: chats of one to three answers, some with tools."""
    writer = Writer(seed)
    rows = [
        {"messages": writer.turns(*(writer.text() for _ in range(2 * writer.random.randint(1, 3))))}
        for _ in range(count)
    ]
    for number, row in enumerate(rows[:: max(1, count // 10)]):
        row["messages"] += called({"city": "Oslo", "days": 3}, id=f"c{number}", writer=writer)
        row["tools"] = [TOOL]
    return rows


def called(
    arguments: Any,
    *,
    writer: Writer,
    name: str = "get_weather",
    id: str = "c",
    result_id: str | None = None,
) -> list[dict[str, Any]]:
    """A question, a call, its result, and the answer."""
    call = {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}
    result = {"role": "tool", "tool_call_id": result_id or id, "content": writer.text()}
    return [
        {"role": "user", "content": writer.text()},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        result,
        {"role": "assistant", "content": writer.text()},
    ]


def planted(seed: int = 7, clean: int = 200) -> Planted:
    """The corpus: clean rows first, then every kind of planted row, in both files."""
    corpus, writer = Planted(), Writer(seed + 1)
    rows = clean_rows(clean, seed)
    for row in rows:
        corpus.add(row)
    for row in clean_rows(clean // 4, seed + 2):
        corpus.add(row, held_out=True)
    for plant in PLANTS:
        plant(corpus, writer)
    _copies(corpus, writer, [row for row in rows if "tools" not in row])
    return corpus


def _unreadable(corpus: Planted, writer: Writer) -> None:
    corpus.add('{"messages": [', "unreadable-rows")
    corpus.add({"messages": "hello"}, "wrong-shape")
    corpus.add({"messages": [{"content": "hello"}]}, "wrong-shape")
    corpus.add(writer.row(f"{writer.text()} <|im_end|>"), "special-tokens")
    reasoned = writer.row()
    reasoned["messages"][1]["reasoning_content"] = writer.text()
    corpus.add(reasoned, "dropped-content")


def _out_of_order(corpus: Planted, writer: Writer) -> None:
    names = {"u": "user", "a": "assistant", "s": "system"}
    for roles in ("uua", "uaa", "uasua", "sa"):
        turns = [{"role": names[role], "content": writer.text()} for role in roles]
        corpus.add({"messages": turns}, "role-order")


def _targets(corpus: Planted, writer: Writer) -> None:
    corpus.add({"messages": writer.turns(writer.text())}, "unsupervised")
    corpus.add(writer.row(writer.words(250), "No."), "barely-supervised")
    learned = writer.row()
    learned["messages"][0]["train"] = True
    corpus.add(learned, "prompts-trained")
    corpus.add({"messages": writer.turns(*(writer.text() for _ in range(3)))}, "unused-turns")
    corpus.add(writer.row(writer.words(5000), writer.words(200)), "too-long", "length-outliers")


def _misrendered(corpus: Planted, writer: Writer) -> None:
    def add(check: str, kwargs: dict[str, Any], *contents: str) -> None:
        messages = writer.turns(*(contents or (writer.text(), writer.text())))
        corpus.add({"messages": messages, "chat_template_kwargs": kwargs}, check, "template-kwargs")

    add("no-right-target", {"think": True})
    add("stop-token", {"open": True})
    add("bos", {"double_bos": True})
    add("unknown-tokens", {"unknown": True})
    add("rewritten-history", {"rewrite": True}, *(writer.text() for _ in range(4)))
    add("boundary", {"lead": "The c"}, writer.text(), f"apital {writer.text()}")


def _answers(corpus: Planted, writer: Writer) -> None:
    corpus.add(writer.row(answer=""), "empty-answers")
    corpus.add(writer.row(answer="NaN"), "empty-answers")
    corpus.add(writer.row(answer=f"{writer.words(20)} and the"), "cut-off-answers")
    corpus.add(writer.row(answer=f"{writer.text()}\n```\nprint(1)"), "cut-off-answers")
    corpus.add(writer.row(answer='{"name": "fox", "tags": ["quick", "bro'), "cut-off-answers")
    same = writer.text()
    for _ in range(3):
        corpus.add(writer.row(answer=same), "repeated-answers")
    pattern = writer.words(50)
    for number in range(4):
        said = f"{pattern} {writer.words(1)} {writer.words(1)}"
        corpus.add(writer.row(answer=said), *(("format-collapse",) if number else ()))
    question = writer.text()
    corpus.add(writer.row(question, f"{question} {writer.text()}"), "prompt-echo")
    two = f"{writer.text()}\nUser: {writer.text()}\nAssistant: {writer.text()}"
    corpus.add(writer.row(answer=two), "turn-markers")
    corpus.add(writer.row(answer=f"{writer.text()}<|eot_id|>"), "turn-markers")
    corpus.add(writer.row(answer=f"{writer.text()} {'the same words again ' * 9}"), "loops")
    corpus.add(writer.row(answer=f"{writer.text()} {'o' * 80}"), "loops")


def _letters(corpus: Planted, writer: Writer) -> None:
    broken = "caf\u00e9 \u2019n\u2019 na\u00efve".encode().decode("cp1252")
    for damage in (broken, "caf\ufffd", "bell\x07", "\u65e5\u672c".encode().decode("latin-1")):
        corpus.add(writer.row(answer=f"{writer.text()} {damage}"), "encoding")
    corpus.add(writer.row(f"{writer.text()} fish &amp; chips"), "html-entities")


def _tools(corpus: Planted, writer: Writer) -> None:
    wrong: list[Any] = [
        {"days": 3},
        {"city": 5},
        {"city": "Oslo", "unit": "kelvin"},
        {"city": "Oslo", "country": "Norway"},
        '{"city": "Oslo"',
    ]
    for arguments in wrong:
        messages = called(arguments, writer=writer)
        corpus.add({"messages": messages, "tools": [TOOL]}, "tool-calls")
    messages = called({"city": "Oslo"}, name="get_wether", writer=writer)
    corpus.add({"messages": messages, "tools": [TOOL]}, "tool-calls")
    messages = called({"city": "Oslo"}, result_id="other", writer=writer)
    corpus.add({"messages": messages, "tools": [TOOL]}, "tool-results")


def _copies(corpus: Planted, writer: Writer, rows: list[dict[str, Any]]) -> None:
    def changed(row: dict[str, Any], old: str, new: str) -> dict[str, Any]:
        messages = [dict(message) for message in row["messages"]]
        messages[-1]["content"] = messages[-1]["content"].replace(old, new)
        return {"messages": messages}

    def one_word(row: dict[str, Any]) -> dict[str, Any]:
        last = row["messages"][-1]["content"].split()[-1]
        return changed(row, last, "lighthouse.")

    corpus.add(rows[0], "duplicates")
    corpus.add(changed(rows[1], " ", "  "), "duplicates")
    corpus.add(one_word(rows[2]), "near-duplicates", "several-answers")
    corpus.add(writer.row(rows[3]["messages"][0]["content"]), "several-answers")
    corpus.add(rows[4], "leakage", held_out=True)
    corpus.add(writer.row(rows[5]["messages"][0]["content"]), "leakage", held_out=True)
    near = one_word(rows[6])
    near["messages"][0] = dict(near["messages"][0])
    near["messages"][0]["content"] += " Lighthouse?"
    corpus.add(near, "near-leakage", held_out=True)


PLANTS: tuple[Callable[[Planted, Writer], None], ...] = (
    _unreadable,
    _out_of_order,
    _targets,
    _misrendered,
    _answers,
    _letters,
    _tools,
)


def write_model(folder: Path, *, template: str | None = TEMPLATE, **config: Any) -> Path:
    """A model's folder without weights, whose pad is not its stop token."""
    tokenizer = tiny_tokenizer(
        template,
        extra_special=("<s>", "<unk>", "<pad>"),
        bos_token="<s>",
        unk_token="<unk>",
        pad_token="<pad>",
    )
    tokenizer.save_pretrained(folder)
    known = {"model_type": "llama", "max_position_embeddings": CONTEXT, "vocab_size": 448}
    (folder / "config.json").write_text(json.dumps({**known, "eos_token_id": 2, **config}))
    return folder


def write_lines(path: Path, lines: list[str]) -> Path:
    """A JSON Lines file."""
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
