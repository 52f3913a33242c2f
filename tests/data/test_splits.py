import pytest

from tunesmith.data.sources.splits import by_split, card_of, holds_rows, pick_files, split_of
from tunesmith.errors import DataError


@pytest.mark.parametrize(
    ("file", "split"),
    [
        ("train.jsonl", "train"),
        ("data/train-00000-of-00002.parquet", "train"),
        ("data/train_sft-00000-of-00002.parquet", "train_sft"),
        ("test/data-00000-of-00001.arrow", "test"),
        ("gsm8k_dev.jsonl.gz", "validation"),
        ("main/validation/0000.parquet", "validation"),
        ("training/contest.json", "train"),
        ("data-00000-of-00001.arrow", None),
        ("latest.jsonl", None),
    ],
)
def test_names_that_speak_of_a_split(file, split):
    assert split_of(file) == split


def test_what_holds_rows():
    files = ["a.jsonl", "README.md", "dataset_info.json", "x/state.json", ".hidden/a.jsonl"]
    assert [file for file in files if holds_rows(file)] == ["a.jsonl"]


def pick(files, card=None, subset=None, split=None):
    return pick_files(files, card or {}, subset=subset, split=split, where="o/n")


def test_files_by_their_names_where_there_is_no_card():
    files = ["README.md", "test.jsonl", "train-2.jsonl", "train-1.jsonl", "notes.jsonl"]
    assert pick(files) == ["train-1.jsonl", "train-2.jsonl"]
    assert pick(files, split="test") == ["test.jsonl"]
    assert pick(["b.parquet", "a.parquet"]) == ["a.parquet", "b.parquet"]
    assert pick(["data/a.csv"]) == ["data/a.csv"]
    assert by_split(["a.jsonl", "b.jsonl"]) == {"train": ["a.jsonl", "b.jsonl"]}


def test_folders_with_the_same_splits_are_subsets():
    files = [f"{top}/{split}/0000.parquet" for top in ("main", "socratic") for split in
             ("train", "test")]  # fmt: skip
    assert pick(files, subset="main") == ["main/train/0000.parquet"]
    assert pick(files, subset="socratic", split="test") == ["socratic/test/0000.parquet"]
    with pytest.raises(DataError, match="several subsets: main, socratic"):
        pick(files)
    assert pick([*files, "default/train/0000.parquet"]) == ["default/train/0000.parquet"]


CARD = """---
license: mit
configs:
- config_name: main
  default: true
  data_files:
  - split: train
    path: main/train-*
  - split: test
    path: [main/test-*, "extra/**/*.parquet"]
- config_name: lists
  data_files: lists/*.jsonl
- config_name: folder
  data_dir: folder
- config_name: mapped
  data_dir: mapped
  data_files: {dev: "d?.csv"}
---
# A data set
"""
FILES = [
    "README.md", "main/train-1.parquet", "main/train-0.parquet", "main/test-0.parquet",
    "main/old/train-9.parquet", "extra/a/b/c.parquet", "lists/a.jsonl", "lists/b/c.jsonl",
    "folder/train.json", "folder/test.json", "mapped/d1.csv", "mapped/d10.csv",
]  # fmt: skip


def test_the_card_says_which_files_are_which():
    card = card_of(CARD)
    assert pick(FILES, card) == ["main/train-0.parquet", "main/train-1.parquet"]
    assert pick(FILES, card, "main") == pick(FILES, card)
    found = ["extra/a/b/c.parquet", "main/test-0.parquet"]
    assert sorted(pick(FILES, card, split="test")) == found
    assert pick(FILES, card, "lists") == ["lists/a.jsonl"]
    assert pick(FILES, card, "folder", "test") == ["folder/test.json"]
    assert pick(FILES, card, "mapped") == ["mapped/d1.csv"]


@pytest.mark.parametrize("readme", ["", "# no front matter", "---\n: [\n---\n", "---\n- a\n---\n"])
def test_readmes_without_a_card(readme):
    assert card_of(readme) == {}


@pytest.mark.parametrize(
    ("files", "options", "message", "hint"),
    [
        (["train.csv", "test.csv"], {"split": "tset"}, "no split tset; there are: ", "test"),
        (["train.csv"], {"split": "train[:10%]"}, "no split", "limit"),
        (["train.csv"], {"subset": "main"}, "no subset main", None),
        (["dev.csv", "test.csv"], {}, "several splits", "split: "),
        (["script.py", "README.md"], {}, "no file with rows", "refs/convert/parquet"),
        (["train.csv", "train.jsonl"], {}, r"several kinds: .csv .jsonl", "one kind"),
    ],
)
def test_what_is_not_clear_is_refused(files, options, message, hint):
    with pytest.raises(DataError, match=message) as caught:
        pick(files, **options)
    assert caught.value.where == "o/n"
    if hint:
        assert hint in caught.value.hint


def test_a_card_that_names_what_is_not_there_or_unreadable():
    def card(path):
        return {"configs": [{"data_files": path}]}

    with pytest.raises(DataError, match="not there"):
        pick(["a.csv"], card("b.csv"))
    with pytest.raises(DataError, match=r"can't read a\.xml"):
        pick(["a.xml"], card("*"))
