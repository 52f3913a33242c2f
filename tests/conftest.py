"""Fixtures that every layer's tests share; the builders are in `tiny.py`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

if os.environ.get("TUNESMITH_TEST_DTYPE"):
    # Here and in every process that a test starts, `model.dtype: auto` becomes this dtype.
    _hook = str(Path(__file__).parent / "auto_dtype")
    sys.path.insert(0, _hook)
    os.environ["PYTHONPATH"] = os.pathsep.join(
        path for path in (_hook, os.environ.get("PYTHONPATH")) if path
    )
    import importlib

    sys.modules.pop("sitecustomize", None)  # Python may have imported the system's at its start
    importlib.import_module("sitecustomize")


@pytest.fixture(autouse=True, scope="session")
def _cache_of_the_tests(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep prepared documents out of the cache of whoever runs the tests."""
    os.environ["TUNESMITH_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def llama_folder(tmp_path: Path) -> Path:
    from tiny import tiny_folder

    return tiny_folder(tmp_path / "llama")


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    from tiny import chat_rows, write_jsonl

    return write_jsonl(tmp_path / "chats.jsonl", chat_rows())


@pytest.fixture
def smollm2() -> Path:
    folder = os.environ.get("TUNESMITH_SMOLLM2")
    if not folder:
        pytest.skip("TUNESMITH_SMOLLM2 names no SmolLM2 folder")
    return Path(folder)


@pytest.fixture
def torch_settings() -> Iterator[None]:
    """A run sets threads and determinism for the whole process; afterwards they are as before."""
    import torch

    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


@pytest.fixture(scope="module")
def eight_chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of two layers and eight chats in rows.jsonl."""
    from tiny import chat_rows, tiny_folder, write_jsonl

    place = tmp_path_factory.mktemp("given")
    tiny_folder(place / "model", num_hidden_layers=2)
    write_jsonl(place / "rows.jsonl", chat_rows(8))
    return place
