"""Is each answer learned after exactly the ids that inference sees, and where is it refused?

    python benchmarks/templates.py --tokenizers DIR --data DIR

First every chat template in trl's folder over generated chats; then the tokenizers found below
`--tokenizers` over the data sets found below `--data` (those of READERS that are there). The oracle
is that of the tests, plain `apply_chat_template` before each answer. Last, trl's templates with
generation markers: the tokens they mask as the assistant's against our targets under the template
that the model is used with. Writes results/templates.json and .md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))

from trl_masks import MEANINGS, compare_masks  # noqa: E402

from template_oracle import NAMES, compare, make_chat, tally, template_of  # noqa: E402
from tunesmith.data.templates.load import load_template  # noqa: E402

Case = tuple[dict[str, Any], list[dict[str, Any]], Any]
"""A row as it is, the messages it says, and its tools."""


def read(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSON or JSON Lines file."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        return json.loads(text)
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def chat(row: dict[str, Any]) -> Case:
    """A row of messages."""
    return row, row["messages"], row.get("tools")


def question(row: dict[str, Any]) -> Case:
    """A row of school arithmetic."""
    given = {"prompt": row["question"], "completion": row["answer"]}
    turns = [
        {"role": "user", "content": row["question"]},
        {"role": "assistant", "content": row["answer"]},
    ]
    return given, turns, None


def sharegpt(row: dict[str, Any]) -> Case:
    """A row of from and value, read here on its own way."""
    turns: list[dict[str, Any]] = []
    for turn in row["conversations"]:
        value = turn["value"]
        if turn["from"] == "function_call":
            call = {"type": "function", "function": json.loads(value)}
            turns.append({"role": "assistant", "content": "", "tool_calls": [call]})
        else:
            role = {"human": "user", "gpt": "assistant", "observation": "tool"}[turn["from"]]
            turns.append({"role": role, "content": value})
    tools = json.loads(row.get("tools") or "[]")
    # A schema without its wrapping is one that no server takes; inference is asked with it.
    asked = [
        tool if "function" in tool else {"type": "function", "function": tool} for tool in tools
    ]
    return row, turns, asked or None


READERS: dict[str, Callable[[dict[str, Any]], Case]] = {
    "gsm8k/train.jsonl": question,
    "oasst_en_100/messages.jsonl": chat,
    "sgd_tools/dev.jsonl": chat,
    "sgd_tools/train.jsonl": chat,
    "bfcl/messages.jsonl": chat,
    "glaive_toolcall/glaive_toolcall_en_demo.json": sharegpt,
    "fastchat/dummy_conversation.json": sharegpt,
}


def over_templates(chats: int) -> dict[str, Any]:
    """Each published template over generated chats; their seed is the template's name."""
    found: dict[str, Any] = {}
    for name in NAMES:
        draw = random.Random(name)
        made = [make_chat(draw) for _ in range(chats)]
        template = template_of(name)
        found[name] = tally(
            [compare(row, template, row["messages"], row.get("tools")) for row in made]
        )
        print(name, found[name]["turns"], found[name]["mismatches"], file=sys.stderr)
    return found


def over_data(folders: list[Path], data: Path, rows: int) -> Iterator[dict[str, Any]]:
    """Each real tokenizer over each data set, of which `rows` rows spread evenly are taken."""
    for folder in folders:
        template = load_template(folder)
        for name, reader in READERS.items():
            if not (data / name).is_file():
                continue
            every = read(data / name)
            picked = every[:: max(1, len(every) // rows)][:rows]
            cases = [reader(row) for row in picked]
            result = tally([compare(row, template, said, tools) for row, said, tools in cases])
            print(folder, name, result["turns"], result["mismatches"], file=sys.stderr)
            yield {"tokenizer": _called(folder, folders), "data": name, **result}


def _called(folder: Path, folders: list[Path]) -> str:
    """The part of the path by which the tokenizers differ."""
    for at, part in enumerate(folder.parts):
        if len({other.parts[at] for other in folders if at < len(other.parts)}) > 1:
            return part.removeprefix("x_")
    return folder.name


def kinds(result: dict[str, Any]) -> str:
    """Refusals by kind."""
    return ", ".join(f"{kind} {count}" for kind, count in result["refused"].items()) or "-"


def table(found: dict[str, Any]) -> str:
    """The Markdown page."""
    generated, real = found["templates"], found["data"]
    both = [*generated.values(), *real]
    lines = [
        "# Templates",
        "",
        f"Measured with `python benchmarks/templates.py` on Python {found['python']}, transformers "
        f"{found['transformers']}, trl {found['trl']}. For each answer that is learned, the oracle "
        "asks the tokenizer for `apply_chat_template(messages[:k], add_generation_prompt=True)`: "
        "the ids on the document's path before the answer must equal these, and its targets must "
        "be the ids of what the template then writes, up to one stop token at their end. A row "
        "that can't be learned so is refused, and counted here by kind.",
        "",
        f"**{sum(r['turns'] for r in both):,} answers checked, "
        f"{sum(r['mismatches'] for r in both)} mismatches.**",
        "",
        "## Real tokenizers, real data",
        "",
        "| tokenizer | data | rows | taken | answers | mismatches | refused |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in real:
        lines.append(
            f"| {r['tokenizer']} | {r['data']} | {r['rows']} | {r['taken']} | {r['turns']} | "
            f"{r['mismatches']} | {kinds(r)} |"
        )
    lines += [
        "",
        "## Published templates, generated chats",
        "",
        "The templates in trl's wheel, on a small tokenizer that has their markers as tokens. A "
        "template that writes today's date has `2024-07-26` there instead. The chats have a system "
        "prompt or none, tools, calls and their results, reasoning, empty contents, Unicode and "
        "texts of control tokens, so that most templates must refuse some.",
        "",
        "| template | chats | taken | answers | mismatches | refused |",
        "|---|---|---|---|---|---|",
    ]
    for name, r in generated.items():
        lines.append(
            f"| {name} | {r['rows']} | {r['taken']} | {r['turns']} | {r['mismatches']} | "
            f"{kinds(r)} |"
        )
    return "\n".join([*lines, *EXPLAINED, *masks_table(found["masks"])]) + "\n"


EXPLAINED = [
    "",
    "| refused as | because |",
    "|---|---|",
    "| dropped-content | the template leaves out a content, tools, a call or an answer's "
    "reasoning: what is learned would not be what the data says |",
    "| template-refused | the template raises: no system prompt, roles must alternate, one call a "
    "turn, contents as lists only |",
    "| generation-prompt-mismatch | the generation prompt opens or closes `<think>` and the "
    "rendered answer does not begin so: there is no right target |",
    "| no-stop-token | the template closes an answer only with the next turn's header, which is "
    "not there |",
    "| special-token-in-content | a content holds the text of a control token |",
    "| empty-answer | an answer without content and calls |",
]


def masks_table(masks: list[dict[str, Any]]) -> list[str]:
    """trl's masks against our targets."""
    kinds_found = Counter(kind for entry in masks for kind in entry["differences"])
    lines = [
        "",
        "## trl's training templates",
        "",
        "For assistant-only loss trl swaps a template for its `_training` form, which marks the "
        "answers, and renders a chat once. Here its mask over a chat's tokens stands against our "
        "targets under the template without the markers, which is what the model is used with, "
        "answer by answer: the ids before it and the ids learned.",
        "",
        "| difference | answers | what it is |",
        "|---|---|---|",
        *(
            f"| {kind} | {sum(entry['differences'].get(kind, 0) for entry in masks)} | {said} |"
            for kind, said in MEANINGS.items()
            if kinds_found[kind]
        ),
        "",
        "| template | chat | answers | the same | differences, with the tokens |",
        "|---|---|---|---|---|",
    ]
    for entry in masks:
        told = "; ".join(
            f"{kind} {count}"
            + (f" (`{entry['examples'][kind]}`)" if entry["examples"][kind] else "")
            for kind, count in entry["differences"].items()
        )
        lines.append(
            f"| {entry['template']} | {entry['chat']} | {entry['answers']} | {entry['same']} | "
            f"{told or '-'} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizers", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--chats", type=int, default=100, help="generated, for each template")
    parser.add_argument("--rows", type=int, default=200, help="of each data set")
    args = parser.parse_args()
    folders = sorted({path.parent for path in args.tokenizers.rglob("tokenizer.json")})
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "transformers": version("transformers"),
        "trl": version("trl"),
        "data": list(over_data(folders, args.data, args.rows)),
        "templates": over_templates(args.chats),
        "masks": compare_masks(),
    }
    results = HERE / "results"
    results.joinpath("templates.json").write_text(json.dumps(found, indent=1) + "\n")
    results.joinpath("templates.md").write_text(table(found), encoding="utf-8")


if __name__ == "__main__":
    main()
