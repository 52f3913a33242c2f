"""A model folder with a damaged file: every command that reads it ends with exit code 2 and names
the file and what it is; no error of a library comes through.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tiny import chat_rows, tiny_folder, write_jsonl
from tunesmith.cli.app import run
from tunesmith.errors import ModelError
from tunesmith.model.model_files import check_model_files, open_weights, weight_files

SHORT = ["batch.documents=4", "train.steps=2", "device.threads=1"]
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1234\n"
PAGE = b"<!DOCTYPE html><html><body>Sign in</body></html>"
WRONG: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "pointer": (lambda _: POINTER, "Git LFS pointer"),
    "page": (lambda _: PAGE, "HTML"),
    "empty": (lambda _: b"", "is empty"),
    "zeros": (lambda data: bytes(len(data)), "zeros"),
    "archive": (lambda _: b"PK\x03\x04" + b"x" * 60, "archive"),
    "half": (lambda data: data[: len(data) // 2], "is cut off|is no whole JSON"),
    "one byte less": (lambda data: data.rstrip()[:-1], "is cut off|is no whole JSON"),
    "seven bytes": (lambda data: data[:7], "is no safetensors file|is no whole JSON"),
    "other text": (lambda _: b'["what?"]' + b" " * 200, "no safetensors file|not a JSON object"),
    "not UTF-8": (
        lambda data: data[:20] + b"\xff\xfe" + data[22:],
        "is no whole safetensors file|is not UTF-8|is cut off",
    ),
}
WEIGHTS = "model.safetensors"
TEXTS = ("config.json", "tokenizer.json", "tokenizer_config.json")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("model-files") / "model", num_hidden_layers=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("rows") / "rows.jsonl", chat_rows(8))


def every_command(model: Path, data: Path, out: Path) -> Iterator[list[str]]:
    """A command line of each command that reads weights."""
    both = ["--model", str(model), "--data", str(data)]
    yield ["train", *both, "--out", str(out / "run"), *SHORT]
    yield ["train", *both, "--out", str(out / "lora"), *SHORT, "adapter=pissa"]
    yield ["plan", *both]
    yield ["eval", str(model), "--data", str(data)]
    yield ["chat", str(model), "--prompt", "x"]
    yield ["generate", str(model), "--data", str(data), "--out", str(out / "answers.jsonl")]
    yield ["export", str(model), "--to", "hf", "--out", str(out / "hf")]
    yield ["export", str(model), "--to", "gguf", "--out", str(out / "gguf")]


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("name", [WEIGHTS, *TEXTS])
def test_wrong_file_is_named_by_every_command(
    name: str, kind: str, whole: Path, data: Path, tmp_path: Path, capfd
) -> None:
    model = tmp_path / "model"
    shutil.copytree(whole, model)
    change, said = WRONG[kind]
    (model / name).write_bytes(change((whole / name).read_bytes()))
    for words in every_command(model, data, tmp_path / "out"):
        assert run(words) == 2, words
        error = capfd.readouterr().err
        assert str(model / name) in error, words
        assert any(part in error for part in said.split("|")), (words, error)
        assert "hint: " in error
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_wrong_file_of_an_adapter_is_named(
    name: str, whole: Path, data: Path, tmp_path: Path, capfd
) -> None:
    out = tmp_path / "run"
    words = ["train", "--model", str(whole), "--data", str(data), "--out", str(out)]
    assert run([*words, *SHORT, "adapter=lora"]) == 0
    capfd.readouterr()
    good = (out / "model" / name).read_bytes()
    for kind, (change, said) in WRONG.items():
        (out / "model" / name).write_bytes(change(good))
        for words in (
            ["chat", str(out), "--prompt", "x"],
            ["merge", str(out), "--out", str(tmp_path / "merged")],
            [
                "train",
                "--model",
                str(out),
                "--data",
                str(data),
                "--out",
                str(tmp_path / "r"),
                *SHORT,
            ],
        ):
            assert run(words) == 2, (kind, words)
            error = capfd.readouterr().err
            assert str(out / "model" / name) in error, (kind, words)
            assert any(part in error for part in said.split("|")), (kind, error)


@pytest.mark.parametrize("name", [WEIGHTS, *TEXTS, "chat_template.jinja"])
def test_flipped_bits_end_in_an_error_or_in_a_model(
    name: str, whole: Path, data: Path, tmp_path: Path, capfd
) -> None:
    """A flip can't be told from another model's file; it must end in exit code 0 or 2, or in 1
    for weights that are no numbers.
    """
    model = tmp_path / "model"
    shutil.copytree(whole, model)
    good = (whole / name).read_bytes()
    header = 8 + int.from_bytes(good[:8], "little") if name == WEIGHTS else len(good)
    picked = random.Random(17)
    for trial in range(12):
        bad = bytearray(good)
        bad[picked.randrange(header)] ^= 1 << picked.randrange(8)
        (model / name).write_bytes(bad)
        code = run(["chat", str(model), "--prompt", "x", "--max-new-tokens", "1"])
        error = capfd.readouterr().err
        assert code in (0, 2), (trial, error)
        assert "Traceback" not in error


def test_values_of_wrong_types_in_a_config_are_errors(
    whole: Path, data: Path, tmp_path: Path, capfd
) -> None:
    model = tmp_path / "model"
    shutil.copytree(whole, model)
    good = json.loads((whole / "config.json").read_text())
    for key in (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "vocab_size",
        "head_dim",
    ):
        for value in (0, -1, "64", None, [], {}, 1.5, 3, True):
            (model / "config.json").write_text(json.dumps({**good, key: value}))
            for words in (
                ["plan", "--model", str(model), "--data", str(data)],
                ["chat", str(model), "--prompt", "x", "--max-new-tokens", "1"],
            ):
                code = run(words)
                error = capfd.readouterr().err
                assert code in (0, 2), (key, value, words, error)


def test_files_that_the_index_names_must_be_there(whole: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(whole, model)
    (model / WEIGHTS).rename(model / "model-00001-of-00002.safetensors")
    index = model / "model.safetensors.index.json"
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index.write_text(json.dumps({"weight_map": {"a": names[0], "b": names[1]}}))
    with pytest.raises(ModelError, match=r"00002-of-00002.safetensors of its 2 files"):
        check_model_files(model, weights=True)
    check_model_files(model, weights=False)
    shutil.copyfile(model / names[0], model / names[1])
    check_model_files(model, weights=True)
    # what nothing reads is not looked at
    (model / "consolidated.safetensors").write_bytes(POINTER)
    check_model_files(model, weights=True)
    assert [path.name for path in weight_files(model)] == names
    for wrong in ({}, {"weight_map": []}, {"weight_map": {}}):
        index.write_text(json.dumps(wrong))
        with pytest.raises(ModelError, match="names no weights"):
            check_model_files(model, weights=True)


def test_a_file_that_changes_is_looked_at_again(whole: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(whole, model)
    check_model_files(model, weights=True)
    (model / WEIGHTS).write_bytes(POINTER)
    with pytest.raises(ModelError, match="Git LFS pointer"):
        check_model_files(model, weights=True)
    with pytest.raises(ModelError, match="Git LFS pointer"):
        open_weights(model / WEIGHTS)
    shutil.copyfile(whole / WEIGHTS, model / WEIGHTS)
    check_model_files(model, weights=True)
    with open_weights(model / WEIGHTS) as file:
        assert file.get_tensor("lm_head.weight").dtype == torch.float32
