import json
import os
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import errors

from tunesmith.data.sources.hub import fetch, is_hub_id
from tunesmith.data.sources.sources import Source, read_rows
from tunesmith.errors import DataError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CARD = """---
configs:
- config_name: main
  data_files: {train: "d/*.jsonl"}
---
"""
LIBRARY = import_module(errors.HfHubHTTPError.__bases__[0].__module__.split(".")[0])


class Hub:
    """A hub that serves one folder, in the layout of the real one's cache."""

    def __init__(self, cache: Path) -> None:
        self.folder = cache / "datasets--o--n" / "snapshots" / COMMIT
        self.names: list[str] = []
        self.failure: Exception | None = None
        self.asked: list[tuple] = []

    def add(self, name: str, content: str) -> None:
        """A file, which lies in `blobs` as in the cache of the real hub."""
        blob = self.folder.parent.parent / "blobs" / f"{len(self.names)}"
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_text(content)
        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / name).symlink_to(os.path.relpath(blob, (self.folder / name).parent))
        self.names.append(name)

    def dataset_info(self, name: str, *, revision: str | None = None) -> SimpleNamespace:
        self.asked.append(("info", name, revision))
        if self.failure:
            raise self.failure
        siblings = [SimpleNamespace(rfilename=name) for name in self.names]
        return SimpleNamespace(sha=COMMIT, siblings=siblings)

    def download(self, name, file, *, repo_type, revision, local_files_only) -> str:
        self.asked.append(("file", file, repo_type, revision, local_files_only))
        if not (self.folder / file).exists():
            raise errors.LocalEntryNotFoundError("not in the cache")
        return str(self.folder / file)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch) -> Hub:
    made = Hub(tmp_path / "cache")
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "ours"))
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: made)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", made.download)
    return made


def answer(kind: type, status: int) -> Exception:
    response = LIBRARY.Response(status, request=LIBRARY.Request("GET", "https://hub.invalid/x"))
    return kind("the hub says no", response=response)


def test_ids_and_paths():
    assert is_hub_id("openai/gsm8k")
    assert not any(map(is_hub_id, ["gsm8k", "data/a.jsonl", "a/b/c", "../x", "/a/b", "d/a.csv.gz"]))


def test_rows_of_a_hub_data_set_know_where_they_are_from(hub):
    hub.add("README.md", CARD)
    hub.add("d/b.jsonl", '{"text": "b"}\n')
    hub.add("d/a.jsonl", '{"text": "a"}\n{"text": "aa"}\n')
    hub.add("old/c.jsonl", '{"text": "c"}\n')
    found = fetch("o/n", subset="main", split="train", revision="v1")
    assert found.commit == COMMIT
    rows = [row for name, path in found.files for row in read_rows(Source(name, path=path))]
    assert [str(row.origin) for row in rows] == ["o/n/d/a.jsonl:0", "o/n/d/a.jsonl:1",
                                                 "o/n/d/b.jsonl:0"]  # fmt: skip
    assert hub.asked[0] == ("info", "o/n", "v1")
    # Everything is of the commit that the branch was at, and nothing else is downloaded.
    assert {call[1:] for call in hub.asked[1:]} == {
        (name, "dataset", COMMIT, False) for name in ("README.md", "d/a.jsonl", "d/b.jsonl")
    }


def test_what_was_read_once_is_found_without_a_connection(hub):
    hub.add("train.jsonl", "{}")
    first = fetch("o/n", revision="v1")
    for failure in (
        errors.OfflineModeIsEnabled("off"),
        LIBRARY.ConnectError("no route"),
        answer(errors.HfHubHTTPError, 503),
    ):
        hub.failure = failure
        for revision in ("v1", COMMIT):
            assert fetch("o/n", revision=revision) == first
        with pytest.raises(DataError, match="never read from the hub") as caught:
            fetch("o/n", revision="v2")
        assert "HF_HUB_OFFLINE" in caught.value.hint
    assert {call[-1] for call in hub.asked if call[0] == "file"} == {False, True}
    # A shard that is gone from the cache is missed, not passed over.
    (hub.folder / "train.jsonl").unlink()
    with pytest.raises(DataError, match=r"train\.jsonl can't be downloaded"):
        fetch("o/n", revision="v1")


@pytest.mark.parametrize(
    ("failure", "message", "hint"),
    [
        (answer(errors.RepositoryNotFoundError, 404), "neither a file or folder", "hf auth login"),
        (answer(errors.GatedRepoError, 403), "grant access", "hf auth login"),
        (answer(errors.RevisionNotFoundError, 404), "no revision v9", "leave out revision"),
        (answer(errors.HfHubHTTPError, 401), "refuses it", None),
        (errors.HFValidationError("bad"), "neither a file or folder", "current folder"),
    ],
)
def test_refusals_of_the_hub(hub, failure, message, hint):
    hub.failure = failure
    with pytest.raises(DataError, match=message) as caught:
        fetch("o/n", revision="v9")
    assert caught.value.where == "o/n"
    if hint:
        assert hint in caught.value.hint


@pytest.mark.parametrize(
    "name", ["../train.jsonl", "a/../../train.jsonl", "/etc/train.jsonl", "a\\..\\train.jsonl",
             "C:/train.jsonl", "./train.jsonl", "a//train.jsonl"]
)  # fmt: skip
def test_names_that_lead_out_of_the_folder_are_refused(hub, name):
    hub.names = ["ok/train.jsonl", name]
    with pytest.raises(DataError, match="leads out of its folder"):
        fetch("o/n")
    assert [call[0] for call in hub.asked] == ["info"]


def test_a_link_that_leads_out_of_the_folder_is_refused(hub, tmp_path):
    secret = tmp_path / "secret.jsonl"
    secret.write_text('{"text": "mine"}')
    hub.folder.mkdir(parents=True)
    (hub.folder / "train.jsonl").symlink_to(secret)
    hub.names = ["train.jsonl"]
    with pytest.raises(DataError, match="link that leads out"):
        fetch("o/n")


def test_the_kept_listing_is_whole_json(hub, tmp_path):
    hub.add("train.jsonl", "{}")
    fetch("o/n")
    kept = sorted((tmp_path / "ours" / "hub").iterdir())
    assert len(kept) == 2
    assert all(json.loads(path.read_text())["commit"] == COMMIT for path in kept)
