"""No code that comes with a model is run: no pickle is read, no Python file imported."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import os
import pickletools
import py_compile
import re
import shutil
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import tunesmith
from tiny import chat_rows, tiny_folder, write_jsonl
from tunesmith.cli.app import run
from tunesmith.train.user_objective import load_objective

SOURCE = Path(tunesmith.__file__).parent
SHORT = ["batch.documents=4", "train.steps=2", "checkpoint.every=1", "device.threads=1"]


class Bomb:
    """A pickle of it makes a file when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_folder(tmp_path / "model", num_hidden_layers=1)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "code-was-run"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "rows.jsonl", chat_rows(8))


def every_command(model: Path, data: Path, out: Path) -> Iterator[list[str]]:
    """A command line of each command that reads a model."""
    both = ["--model", str(model), "--data", str(data)]
    yield ["train", *both, "--out", str(out), *SHORT]
    yield ["plan", *both]
    yield ["preview", *both]
    yield ["doctor", *both]
    yield ["eval", str(model), "--data", str(data)]
    yield ["generate", str(model), "--data", str(data), "--out", str(out / "answers.jsonl")]
    yield ["chat", str(model)]
    yield ["export", str(model), "--to", "hf", "--out", str(out / "hf")]


def test_pickles_bomb_goes_off_when_it_is_read(mark: Path, tmp_path: Path) -> None:
    """The test's own test: what is planted below does run where a pickle is read."""
    torch.save(Bomb(mark), tmp_path / "x.bin")
    torch.load(tmp_path / "x.bin", weights_only=False)
    assert mark.exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth"])
def test_model_of_pickles_is_refused_by_every_command(
    name: str, model: Path, data: Path, mark: Path, tmp_path: Path, capsys
) -> None:
    (model / "model.safetensors").unlink()
    torch.save(Bomb(mark), model / name)
    zero_weight = {"preview", "doctor"}  # they read the tokenizer alone
    for words in every_command(model, data, tmp_path / "out"):
        code = run(words)
        error = capsys.readouterr().err
        assert not mark.exists(), words
        if words[0] not in zero_weight or code:
            assert (code, "pickle" in error, name in error, "hint:" in error) == (
                2, True, True, True,
            ), (words, error)  # fmt: skip


def test_pickle_beside_safetensors_is_not_read(
    model: Path, data: Path, mark: Path, tmp_path: Path
) -> None:
    torch.save(Bomb(mark), model / "pytorch_model.bin")
    out = tmp_path / "run"
    assert (
        run(["train", "--model", str(model), "--data", str(data), "--out", str(out), *SHORT]) == 0
    )
    assert not mark.exists()


def test_pickle_is_not_read_where_the_safetensors_are_of_another_model(
    model: Path, data: Path, mark: Path, tmp_path: Path, capsys
) -> None:
    """A loader that looks for names of its own would pass over the file and take the pickle."""
    torch.save(Bomb(mark), model / "pytorch_model.bin")
    (model / "model.safetensors").rename(model / "something.safetensors")
    out = tmp_path / "run"
    assert (
        run(["train", "--model", str(model), "--data", str(data), "--out", str(out), *SHORT]) == 2
    )
    assert not mark.exists()
    assert "Traceback" not in capsys.readouterr().err


def test_adapter_of_pickles_is_refused(
    model: Path, data: Path, mark: Path, tmp_path: Path, capsys
) -> None:
    out = tmp_path / "run"
    lora = ["adapter=lora", *SHORT]
    assert run(["train", "--model", str(model), "--data", str(data), "--out", str(out), *lora]) == 0
    adapter = out / "model"
    (adapter / "adapter_model.safetensors").unlink()
    torch.save(Bomb(mark), adapter / "adapter_model.bin")
    capsys.readouterr()
    assert run(["eval", str(adapter), "--data", str(data)]) == 2
    assert not mark.exists()
    assert "adapter_model.bin" in capsys.readouterr().err


def is_pickle(content: bytes) -> bool:
    """True for a pickle of protocol 2 or newer, plain or in torch's zip."""
    if zipfile.is_zipfile(io.BytesIO(content)):
        return True
    if not re.match(b"\x80[\x02-\x05]", content):
        return False
    try:
        pickletools.dis(content, out=io.StringIO())
    except Exception:
        return False
    return True


def test_no_file_of_a_run_is_a_pickle(model: Path, data: Path, tmp_path: Path) -> None:
    probe = io.BytesIO()
    torch.save({"x": torch.zeros(1)}, probe)
    assert is_pickle(probe.getvalue())
    out = tmp_path / "run"
    assert (
        run(["train", "--model", str(model), "--data", str(data), "--out", str(out), *SHORT]) == 0
    )
    files = [path for path in out.rglob("*") if path.is_file()]
    assert any("step-2" in str(path) for path in files)
    assert not [path for path in files if is_pickle(path.read_bytes())]


LOADERS = {
    r"\bpickle\.loads?\(": {"data/preprocess/workers.py"},  # from a process of its own, by a pipe
    r"torch\.load\(|np\.load\(|numpy\.load\(|joblib|dill|marshal|shelve": set(),
    r"yaml\.(unsafe_|full_)?load\(|UnsafeLoader|FullLoader": set(),
    r"\b(?<!\.)(eval|exec)\(": {
        "train/user_objective.py"
    },  # of the user, the bytes that are hashed
    r"allow_pickle|weights_only=False|trust_remote_code=True": set(),
}


@pytest.mark.parametrize("pattern", LOADERS)
def test_source_has_no_other_way_to_read_code_from_data(pattern: str) -> None:
    found = {
        path.relative_to(SOURCE).as_posix()
        for path in SOURCE.rglob("*.py")
        if re.search(pattern, path.read_text(encoding="utf-8"))
    }
    assert found == LOADERS[pattern]


CODE = """
from pathlib import Path
from typing import Any
Path({mark!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class OwnConfig(LlamaConfig):
    model_type = "own_llama"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize("what", ["model", "tokenizer"])
def test_models_own_code_is_refused_and_named_unless_trusted(
    what: str, model: Path, data: Path, mark: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    (model / "own_code.py").write_text(CODE.format(mark=str(mark)))
    if what == "model":
        names = {"AutoConfig": "own_code.OwnConfig", "AutoModelForCausalLM": "own_code.OwnModel"}
        change(model / "config.json", auto_map=names, model_type="own_llama")
    else:
        names = {"AutoTokenizer": [None, "own_code.OwnTokenizer"]}
        change(model / "tokenizer_config.json", auto_map=names, tokenizer_class="OwnTokenizer")
    refused = 0
    for words in every_command(model, data, tmp_path / "out"):
        code = run(words)
        error = capsys.readouterr().err
        assert not mark.exists(), words
        assert "Traceback" not in error
        if code:
            assert code == 2, words
            assert "trust_remote_code" in error, (words, error)
            refused += 1
    assert refused >= 5


def test_trusted_code_is_run(model: Path, data: Path, mark: Path, tmp_path: Path) -> None:
    """The test's own test: the planted code is code that transformers runs when it is allowed."""
    (model / "own_code.py").write_text(CODE.format(mark=str(mark)))
    names = {"AutoConfig": "own_code.OwnConfig", "AutoModelForCausalLM": "own_code.OwnModel"}
    change(model / "config.json", auto_map=names, model_type="own_llama")
    out = tmp_path / "run"
    words = ["train", "--model", str(model), "--data", str(data), "--out", str(out), *SHORT]
    assert run([*words, "model.trust_remote_code=true"]) == 0
    assert mark.exists()


def test_code_beside_data_and_templates_is_not_imported(
    model: Path, mark: Path, tmp_path: Path
) -> None:
    """A data set's loading script, a sitecustomize or a conftest in a folder is only a file."""
    folder = tmp_path / "set"
    folder.mkdir()
    write_jsonl(folder / "rows.jsonl", chat_rows(4))
    for name in ("set.py", "sitecustomize.py", "__init__.py", "own_code.py"):
        (folder / name).write_text(CODE.format(mark=str(mark)))
        shutil.copy(folder / name, model / name)
    assert run(["preview", "--model", str(model), "--data", str(folder)]) == 0
    assert not mark.exists()


OWN = "def my_loss(chunk):\n    return -chunk.logprob  # {}\n"


def test_the_objective_that_runs_is_the_one_that_was_hashed(tmp_path: Path, mark: Path) -> None:
    """Bytecode beside a file stands for it where time and size fit, whatever it does."""
    file = tmp_path / "own.py"
    file.write_text(OWN.format("a"))
    evil = f"import pathlib; pathlib.Path({str(mark)!r}).touch()\n" + OWN.format("b")
    planted = tmp_path / "evil.py"
    planted.write_text(evil)
    compiled = py_compile.compile(str(planted), doraise=True)
    header = struct.pack("<III", 0, int(file.stat().st_mtime), file.stat().st_size)
    code = Path(compiled).read_bytes()
    place = Path(importlib.util.cache_from_source(str(file)))
    place.parent.mkdir(exist_ok=True)
    place.write_bytes(code[:4] + header + code[16:])
    # the test's own test: an import does run what was planted
    spec = importlib.util.spec_from_file_location("own", file)
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert mark.exists()
    mark.unlink()
    found = load_objective(f"{file}:my_loss", [])
    assert not mark.exists()
    assert found.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()


def test_an_edit_of_equal_size_in_the_same_second_is_seen(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    stamp = None
    for number in (1, 2, 3):
        file.write_text(f"VALUE = {number}\n" + OWN.format("x"))
        stamp = stamp or (file.stat().st_atime_ns, file.stat().st_mtime_ns)
        os.utime(file, ns=stamp)
        function: Any = load_objective(f"{file}:my_loss", []).function
        assert function.__globals__["VALUE"] == number


def test_a_run_gives_no_leave_to_run_code(
    model: Path, data: Path, mark: Path, tmp_path: Path, capsys
) -> None:
    """A stranger's run: its recipe trusts the code that its model brings."""
    out = tmp_path / "run"
    assert (
        run(["train", "--model", str(model), "--data", str(data), "--out", str(out), *SHORT]) == 0
    )
    folder = out / "model"
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_x.X"}
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("configuration_x.py", "modeling_x.py"):
        (folder / name).write_text(
            f"import pathlib\npathlib.Path({str(mark)!r}).touch()\nX = None\n"
        )
    recipe = (out / "recipe.yaml").read_text()
    changed = re.sub(r"trust_remote_code: false", "trust_remote_code: true", recipe)
    changed = (
        changed
        if changed != recipe
        else recipe.replace("model:\n", "model:\n  trust_remote_code: true\n", 1)
    )
    (out / "recipe.yaml").write_text(changed)
    assert "trust_remote_code: true" in changed
    capsys.readouterr()
    uses = [
        ["chat", str(out), "--prompt", "x"],
        ["eval", str(out), "--data", str(data)],
        ["generate", str(out), "--data", str(data), "--out", str(tmp_path / "a.jsonl")],
    ]
    for words in uses:
        for name in (out, folder):
            assert run([str(name) if word == str(out) else word for word in words]) == 2, words
            error = capsys.readouterr().err
            assert "needs Python code of its own folder" in error
            assert not mark.exists()
    # asked for on this command line it does run
    with contextlib.suppress(Exception):
        run([*uses[0], "model.trust_remote_code=true"])
    assert mark.exists()
