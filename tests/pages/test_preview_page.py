"""The preview page: one file that asks for nothing, in which data is text and never markup."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tiny import chat_rows, tiny_tokenizer, write_jsonl
from tunesmith.cli.app import run

EVIL = "</pre><script>alert(1)</script><img src=x onerror=alert(2)>\"'><!-- &lt;b&gt; \u202e\x07"
VOID = {"meta", "input", "br"}


class Page(HTMLParser):
    """Elements as (tag, attributes, path of open tags), and text by element."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None], tuple[str, ...]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), tuple(self.open)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open
        assert self.open[-1] == tag, f"</{tag}> inside {self.open}"
        self.open.pop()

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    def tags(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes, _ in self.elements if tag == name]

    def text_in(self, name: str) -> str:
        return "".join(text for tag, text in self.texts if tag == name)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    tiny_tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text('{"max_position_embeddings": 512, "model_type": "llama"}')
    return folder


def written(model: Path, rows: list[dict], tmp_path: Path, *more: str, code: int = 0) -> str:
    data, page = write_jsonl(tmp_path / "data.jsonl", rows), tmp_path / "page.html"
    assert (
        run(["preview", "--model", str(model), "--data", str(data), "--html", str(page), *more])
        == code
    )
    return page.read_text(encoding="utf-8")


def evil_rows() -> list[dict]:
    return [
        {"messages": [{"role": "user", "content": EVIL}, {"role": "assistant", "content": EVIL}]},
        {"messages": [{"role": EVIL, "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "é😀中"}]},
    ]


def test_no_text_of_the_data_becomes_markup(model: Path, tmp_path: Path):
    text = written(model, evil_rows(), tmp_path)
    page = Page(text)
    assert len(page.tags("script")) == 1
    assert not page.tags("img")
    for tag, attributes, _ in page.elements:
        assert not any(
            name.startswith("on") or name in ("src", "href", "style") for name in attributes
        ), tag
    assert "alert(1)" in page.text_in("pre")
    assert "alert" not in page.text_in("script")
    assert "\u202e" not in text
    assert "⟨U+202E⟩" in text


def test_page_asks_for_nothing_and_runs_only_its_own_script(model: Path, tmp_path: Path):
    text = written(model, evil_rows(), tmp_path)
    page = Page(text)
    assert not re.search(r"https?://|@import|url\(", text)
    assert not page.tags("link")
    policy = next(m["content"] for m in page.tags("meta") if "http-equiv" in m)
    assert policy is not None
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for name in ("script", "style"):
        digest = hashlib.sha256(page.text_in(name).encode()).digest()
        assert f"sha256-{base64.b64encode(digest).decode()}" in policy


def test_tokens_are_those_of_the_json_form(model: Path, tmp_path: Path, capsys):
    rows = [*chat_rows(4), *evil_rows()[2:]]
    text = written(model, rows, tmp_path)
    capsys.readouterr()
    data = str(tmp_path / "data.jsonl")
    assert run(["preview", "--model", str(model), "--data", data, "--json", "--rows", "99"]) == 0
    objects = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    page = Page(text)
    shown = [d["data-ids"].split() for d in page.tags("div") if d.get("data-ids")]
    assert shown == [[str(i) for i in s["ids"]] for o in objects for s in o["segments"]]
    tokenizer = tiny_tokenizer()
    for row, found in zip(objects, re.split(r'<li id="row-', text)[1:], strict=True):
        learned = re.findall(
            r"<b\b[^>]*>(.*?)</b>", found.split("</section>")[0].split("</summary>")[1], re.S
        )
        learned = [re.sub(r"<s .*?</s>", "", piece) for piece in learned]
        ids = [target["id"] for target in row["targets"]]
        assert html.unescape("".join(learned)) == tokenizer.decode(ids)
