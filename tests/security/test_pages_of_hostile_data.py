"""No text of data, recipe or model is markup in a page, and a browser runs nothing of it."""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tiny import tiny_tokenizer, write_jsonl
from tunesmith.cli.app import run
from tunesmith.report import write_report

MARK = "TUNESMITH-SCRIPT-WAS-RUN"
RUN = f"document.title='{MARK}'"
EVIL = [
    f"<script>{RUN}</script>",
    f"</pre></li></ol></main><script>{RUN}</script>",
    f"<img src=x onerror=\"{RUN}\">",
    f"'\"><svg/onload=\"{RUN}\">",
    f"<a href=\"javascript:{RUN}\" autofocus onfocus=\"{RUN}\">here</a>",
    f"<iframe srcdoc=\"<script>parent.{RUN}</script>\"></iframe>",
    f"<meta http-equiv=refresh content=\"0;url=javascript:{RUN}\">",
    f"<style>@import 'x';</style><body onload=\"{RUN}\">",
    f"</title><script>{RUN}</script>",
    f"</style><script>{RUN}</script>",
    f"<!--><script>{RUN}</script>",
    f"]]><script>{RUN}</script>",
    f"\" onmouseover=\"{RUN}\" x=\"",
    f"`${{{RUN}}}` {{{{{RUN}}}}}",
    f"&lt;script&gt;{RUN}&lt;/script&gt; \u202e\x00\x1b[31m\ud83d",
    "javascript:" + RUN,
]  # fmt: skip
TAGS = {
    "html", "head", "meta", "title", "style", "body", "script", "h1", "h2", "p", "code", "table",
    "caption", "thead", "tbody", "tr", "th", "td", "section", "strong", "span", "i", "b", "s",
    "header", "form", "label", "br", "input", "fieldset", "main", "ol", "ul", "li", "details",
    "summary", "div", "pre", "svg", "polyline", "text",
}  # fmt: skip


class Elements(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.styles: list[str] = []
        self._in = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        self._in = tag

    def handle_endtag(self, tag):
        self._in = ""

    def handle_data(self, data):
        if self._in == "script":
            self.scripts.append(data)
        if self._in == "style":
            self.styles.append(data)


@pytest.fixture(scope="module")
def preview(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The preview page of rows in which every text is hostile, file names too."""
    folder = tmp_path_factory.mktemp("pages")
    tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "model" / "config.json").write_text('{"model_type": "llama"}')
    rows = [
        {
            "messages": [
                {"role": "user", "content": text},
                {"role": "assistant", "content": text},
            ],
            text: {text: [text]},
        }
        for text in EVIL[:-2]
    ]
    rows += [{"messages": [{"role": text, "content": text}]} for text in EVIL[:-2]]
    rows += [{"messages": text} for text in EVIL[:-2]]
    data = write_jsonl(folder / "<script>document.title='x'<&script>.jsonl", rows)
    page = folder / "preview.html"
    words = ["preview", "--model", str(folder / "model"), "--data", str(data), "--rows", "999"]
    run([*words, "--html", str(page), "data.bad_rows=drop"])
    return page


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report in which the title, the recipe, the ledger and the names of sets are hostile."""
    page = tmp_path_factory.mktemp("report") / "report.html"
    numbers = {"loss": 1.0, "lr": 0.1, "grad_norm": 1.0, "tokens_per_second": 1.0, "epoch": 1.0}
    records = [{"kind": "train", "step": step, **numbers} for step in (1, 2)]
    records += [{"kind": "eval", "step": 2, "nll": 1.0, "set": text} for text in EVIL]
    write_report(
        page,
        title=EVIL[8] + EVIL[0],
        recipe="\n".join(EVIL),
        records=records,
        ledger={text: {text: [text]} for text in EVIL},
    )
    return page


@pytest.fixture(params=["preview", "report"])
def page(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def test_only_our_own_elements_stand_in_the_page(page: Path) -> None:
    for tag, attributes in Elements(page.read_text(encoding="utf-8")).found:
        assert tag in TAGS
        forbidden = [n for n in attributes if n.startswith("on") or n in ("src", "href", "style")]
        assert not forbidden, (tag, attributes)


def test_policy_allows_this_style_and_script_alone(page: Path) -> None:
    elements = Elements(page.read_text(encoding="utf-8"))
    policies = [a["content"] or "" for t, a in elements.found if t == "meta" and "http-equiv" in a]
    assert len(policies) == 1
    parts = dict(part.strip().split(" ", 1) for part in policies[0].split(";"))
    assert parts["default-src"] == "'none'"
    assert parts["base-uri"] == "'none'"
    assert "unsafe" not in policies[0]
    assert "*" not in policies[0]
    for name, sources in (("style-src", elements.styles), ("script-src", elements.scripts)):
        hashes = [
            f"'sha256-{base64.b64encode(hashlib.sha256(one.encode()).digest()).decode()}'"
            for one in sources
        ]
        assert parts.get(name, "").split() == hashes, name


def test_texts_are_there_to_be_read(page: Path) -> None:
    assert "&lt;script&gt;" in page.read_text(encoding="utf-8")


def browser() -> str | None:
    """A headless browser: `TUNESMITH_BROWSER`, or one on the path."""
    named = os.environ.get("TUNESMITH_BROWSER")
    known = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
    return named or next((found for name in known if (found := shutil.which(name))), None)


def opened(page: Path, folder: Path) -> str:
    """The page's elements after a browser has loaded it and waited."""
    found = browser()
    assert found is not None
    words = [found, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}"]
    words += ["--virtual-time-budget=3000", "--timeout=20000", "--dump-dom", page.as_uri()]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


needs_browser = pytest.mark.skipif(browser() is None, reason="no headless browser")


@pytest.mark.slow
@needs_browser
def test_browser_runs_nothing_of_the_data(page: Path, tmp_path: Path) -> None:
    shown = opened(page, tmp_path)
    title = shown.partition("<title>")[2].partition("</title>")[0]
    assert title != MARK
    assert {tag for tag, _ in Elements(shown).found} <= TAGS
    if page.name == "preview.html":
        assert (
            "rows</span>" in shown.split("</form>")[0]
            or 'hidden=""' not in shown.split('id="search"')[1][:60]
        ), "its own script was not run"


@pytest.mark.slow
@needs_browser
def test_browser_runs_what_is_planted_in_a_page_without_care(tmp_path: Path) -> None:
    """The test's own test."""
    careless = tmp_path / "careless.html"
    careless.write_text(f"<!doctype html><title>t</title><body>{EVIL[2]}{EVIL[0]}</body>")
    assert f"<title>{MARK}</title>" in opened(careless, tmp_path / "profile")


@pytest.mark.slow
@needs_browser
def test_policy_holds_even_where_a_script_gets_in(page: Path, tmp_path: Path) -> None:
    text = page.read_text(encoding="utf-8")
    broken = tmp_path / "broken.html"
    broken.write_text(text.replace("<h1>", f"{EVIL[0]}{EVIL[2]}<h1>", 1), encoding="utf-8")
    shown = opened(broken, tmp_path / "profile")
    assert f"<title>{MARK}</title>" not in shown
