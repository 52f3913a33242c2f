"""Names from elsewhere lead to ours, and every name the table points at exists."""

from __future__ import annotations

import json
import re
from importlib.resources import files

import pytest

from tunesmith.config.names import foreign_names, known_keys, suggest

OURS = {f"{section}.{key}" for section, keys in known_keys().items() for key in keys}


def test_every_target_of_the_table_exists() -> None:
    for name, entry in foreign_names().items():
        assert set(entry.keys) <= OURS, name
        assert entry.keys or entry.note, name
        mentioned = re.findall(r"\b([a-z]+\.[a-z_]+)\b", entry.note or "")
        paths = {word for word in mentioned if word.split(".")[0] in known_keys()}
        assert paths <= OURS, name


def test_notes_name_the_keys_they_stand_for() -> None:
    for name, entry in foreign_names().items():
        if entry.note and len(entry.keys) > 1:
            assert all(key in entry.note for key in entry.keys), name


def test_no_foreign_name_is_one_of_ours() -> None:
    ours = {key for keys in known_keys().values() for key in keys} | set(known_keys())
    assert not ours & set(foreign_names())


def test_each_name_stands_in_the_table_once() -> None:
    groups = json.loads(files("tunesmith.config").joinpath("foreign.json").read_text())
    names = [name for group in groups for name in group["names"]]
    assert sorted(names) == sorted(foreign_names())
    assert all(name == name.lower() and "-" not in name for name in names)


def test_the_table_covers_the_trainers() -> None:
    names = foreign_names()
    assert len(names) >= 120
    expected = {
        "learning_rate": "optim.lr",
        "num_train_epochs": "train.epochs",
        "lora_r": "adapter.rank",
        "cutoff_len": "data.max_length",
        "val_set_size": "data.eval",
        "sequence_len": "data.max_length",
        "max_seq_length": "data.max_length",
        "micro_batch_size": "batch.documents",
        "lora_target": "adapter.targets",
        "use_dora": "adapter.kind",
        "load_in_4bit": "model.quantization",
        "bnb_4bit_quant_type": "model.quantization",
        "quantization_bit": "model.quantization",
        "init_lora_weights": "adapter.kind",
        "loraplus_lr_ratio": "adapter.lr_ratio",
        "pissa_iter": "adapter.svd_iterations",
        "unfrozen_parameters": "adapter.parameters",
        "freeze_trainable_layers": "adapter.top_layers",
        "adapter_name_or_path": "adapter.continue_from",
        "report_to": "log.to",
        "enable_activation_checkpointing": "device.gradient_checkpointing",
    }
    for name, key in expected.items():
        assert key in names[name].keys
    split = str(names["per_device_train_batch_size"])
    assert "batch.documents" in split
    assert "device.micro_tokens" in split


@pytest.mark.parametrize(
    ("name", "section", "part"),
    [
        ("learning_rate", None, "optim.lr"),
        ("--num-train-epochs", None, "train.epochs"),
        ("Learning_Rate", "optim", "optim.lr"),
        ("lrr", "optim", "optim.lr"),
        ("lr", None, "optim.lr"),
        ("max_lenght", None, "data.max_length"),
        ("optm", None, "did you mean optim?"),
        ("warmup_ratio", "optim", "below 1 is a share"),
        ("learning_rat", None, "optim.lr"),
        ("optim_type", None, "adamw_8bit"),
        ("lr_scheduler_type", None, "optim.min_lr"),
        ("cosine_min_lr_ratio", "optim", "optim.min_lr"),
        ("embedding_lr", None, "optim.lr_factors"),
        ("optim", "train", "section of its own"),
    ],
)
def test_suggestions(name: str, section: str | None, part: str) -> None:
    assert part in (suggest(name, section=section) or "")


def test_nothing_is_suggested_for_nonsense() -> None:
    assert suggest("zzqqxx") is None
