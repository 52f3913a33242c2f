"""The preview page: one file that asks for nothing, in which data is text and never markup."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import shutil
import subprocess
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
    text = written(model, evil_rows(), tmp_path, code=2)
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
    text = written(model, evil_rows(), tmp_path, code=2)
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


THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' and "
    "loop.last %}thinking {% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_branches_are_a_nested_list_and_turns_are_named(model: Path, tmp_path: Path):
    tiny_tokenizer(THINKING).save_pretrained(model)
    text = written(model, chat_rows(3)[2:], tmp_path)
    page = Page(text)
    depths = [
        path.count("ul") for tag, a, path in page.elements if tag == "div" and a.get("data-ids")
    ]
    assert max(depths) > min(depths) >= 1
    edges = re.findall(r'class="edge">([^<]*)<', text)
    assert edges[0].startswith("segment 0: a root")
    assert any("continues segment 0" in edge for edge in edges)
    labels = re.findall(r'<span class="turn">([^<]*)</span>', text.split('id="rows"')[1])
    for label in ("system · 0", "user · 1", "assistant · 2", "user · 3", "assistant · 4"):
        assert label in labels


def test_weights_are_shades_with_their_number(model: Path, tmp_path: Path):
    turns = [{"role": "user", "content": "say yes"}]
    for weight in (0.2, 0.5, 0.9, 1.0, 2.0):
        turns.append({"role": "assistant", "content": "yes", "weight": weight})
    text = written(model, [{"messages": turns}], tmp_path).split('id="rows"')[1]
    cells = set(
        re.findall(
            r'<b(?: class="([^"]*)")?(?: data-weight="([^"]*)")?>', text.split("</summary>")[1]
        )
    )
    shades = {(kind.replace("sp ", "").replace("sp", ""), weight) for kind, weight in cells}
    assert shades == {("w1", "0.2"), ("w2", "0.5"), ("w3", "0.9"), ("", ""), ("w5", "2")}


def test_ledger_and_reasons_are_on_top(model: Path, tmp_path: Path):
    rows = chat_rows(4)
    rows[1] = {"messages": "no list"}
    rows[3] = {"messages": [{"role": "user", "content": "nobody answers"}]}
    text = written(model, rows, tmp_path, "data.bad_rows=drop")
    page = Page(text)
    numbers = [data for tag, data in page.texts if tag == "td"]
    assert numbers[:5] == ["4", "2", "0", "2", "0"]
    head, listed = text.split('id="rows"')
    assert "wrong-type" in head
    assert "no-targets" in head
    assert [li["data-status"] for li in page.tags("li") if "data-row" in li] == [
        "trained", "dropped", "trained", "dropped",
    ]  # fmt: skip
    assert "must be a list of messages" in listed


def test_rows_that_stop_a_run_are_shown_and_end_with_2(model: Path, tmp_path: Path, capsys):
    rows = chat_rows(4)
    rows[1] = rows[2] = {"messages": "no list"}
    text = written(model, rows, tmp_path, code=2)
    assert re.findall(r'data-status="(\w+)"', text) == ["trained", "refused", "refused", "trained"]
    error = capsys.readouterr().err
    assert "data.jsonl:1" in error
    assert "2 such rows" in error


def test_number_of_rows_is_bounded_and_said(model: Path, tmp_path: Path):
    text = written(model, chat_rows(5), tmp_path, "--rows", "2")
    assert text.count('<li id="row-') == 2
    assert "The first 2 rows" in text
    assert "The first" not in written(model, chat_rows(5), tmp_path, "--rows", "5")


def test_two_outputs_at_once_or_no_folder_are_refused(model: Path, chats: Path, tmp_path: Path):
    words = ["preview", "--model", str(model), "--data", str(chats), "--html"]
    assert run([*words, str(tmp_path / "a.html"), "--json"]) == 2
    assert run([*words, str(tmp_path / "none" / "a.html")]) == 2


def test_a_runs_own_template_choice_holds(model: Path, tmp_path: Path, capsys):
    rows = [{"prompt": "say yes", "completion": "yes"}]
    data = str(write_jsonl(tmp_path / "data.jsonl", rows))

    def ids(*more: str) -> list[int]:
        assert run(["preview", "--model", str(model), "--data", data, "--json", *more]) == 0
        return [i for s in json.loads(capsys.readouterr().out)["segments"] for i in s["ids"]]

    tokenizer = tiny_tokenizer()
    raw = [*tokenizer("say yes")["input_ids"], *tokenizer("yes")["input_ids"], 2]
    chat = ids()
    assert chat != raw
    choice = model / "tunesmith.json"
    choice.write_text(json.dumps({"template": "none", "template_kwargs": {}}))
    assert ids() == raw
    tiny_tokenizer("{{ mood }}" + THINKING).save_pretrained(model)
    choice.write_text(json.dumps({"template": "own", "template_kwargs": {"mood": "yes"}}))
    assert tokenizer.decode(ids()).startswith("yes<|im_start|>")
    assert tokenizer.decode(ids("data.template_kwargs={mood: add}")).startswith("add<|im_start|>")


def test_characters_of_several_tokens_are_one_cell(model: Path, tmp_path: Path):
    text = written(model, evil_rows()[2:], tmp_path)
    learned = re.findall(r"<b\b[^>]*>(.*?)</b>", text.split("</summary>")[1], re.S)
    assert {"é", "😀", "中"} <= set(learned)
    assert "\ufffd" not in text
    sizes = re.search(r'data-ids="([^"]*)" data-sizes="([^"]*)"', text)
    assert sizes is not None
    assert len(sizes[1].split()) == sum(map(int, sizes[2].split()))


BROWSER = """
const fs = require('fs');
const given = JSON.parse(fs.readFileSync(0, 'utf8'));
const heard = {};
function element(more) {
  return Object.assign({
    addEventListener(kind, call) { (this.heard = this.heard || {})[kind] = call; }, focus() {},
  }, more);
}
const rows = given.rows.map((row) => {
  const details = element({open: false, querySelector: () => element({})});
  return element({dataset: row.dataset, textContent: row.text, hidden: false,
    firstElementChild: details, querySelector: () => details, scrollIntoView() {}, details});
});
const ticks = given.statuses.map((value) => element({value, checked: true}));
const named = {find: element({value: ''}), shown: element({}), search: element({hidden: true}),
  token: element({})};
global.document = {
  querySelectorAll: (what) => (what.startsWith('#rows') ? rows : ticks),
  getElementById: (id) => named[id] || null,
  addEventListener(kind, call) { heard[kind] = call; },
};
global.window = {addEventListener() {}};
global.location = {hash: ''};
eval(given.script);
const seen = given.asked.map((text) => {
  named.find.value = text;
  named.search.heard.submit({preventDefault() {}});
  return rows.filter((row) => !row.hidden).map((row) => row.dataset.row);
});
named.find.value = '';
ticks[0].checked = false;
ticks[0].heard.change();
seen.push(rows.filter((row) => !row.hidden).map((row) => row.dataset.row));
seen.push([String(named.search.hidden), named.shown.textContent]);
console.log(JSON.stringify(seen));
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="runs the page's script in node")
def test_search_finds_rows_by_number_place_and_text(model: Path, tmp_path: Path):
    rows = [*chat_rows(12), {"messages": "Nothing like it"}]
    page = Page(written(model, rows, tmp_path, "data.bad_rows=drop"))
    listed = [li for li in page.tags("li") if "data-row" in li]
    given = {
        "rows": [
            {
                "dataset": {
                    name[5:]: value for name, value in li.items() if name.startswith("data-")
                },
                "text": json.dumps(row),
            }
            for li, row in zip(listed, rows, strict=True)
        ],
        "statuses": [box["value"] for box in page.tags("input") if box["type"] == "checkbox"],
        "script": page.text_in("script"),
        "asked": ["1", "007", "jsonl:11", "NOTHING like", "no such text", ""],
    }
    done = subprocess.run(
        ["node", "-e", BROWSER],
        input=json.dumps(given),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    everything = [str(row) for row in range(13)]
    assert json.loads(done.stdout) == [
        ["1"], ["7"], ["11"], ["12"], [], everything, ["12"], ["false", "1 of 13 rows"],
    ]  # fmt: skip
