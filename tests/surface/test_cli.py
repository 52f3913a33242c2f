"""The command line: its grammar, help, exit codes, and what goes to stdout and stderr."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tunesmith import __version__
from tunesmith.cli.app import COMMANDS, run
from tunesmith.cli.errors import run_command
from tunesmith.cli.inputs import recipe_from_arguments, split_arguments
from tunesmith.config.values import Holdout
from tunesmith.errors import DataError, InterruptedRun, RecipeError, RunError

Capture = pytest.CaptureFixture[str]


def test_commands_are_frozen() -> None:
    assert list(COMMANDS) == [
        "init", "doctor", "preview", "score", "select", "convert", "plan", "bench", "verify",
        "launch", "train", "resume", "replay", "eval", "chat", "generate", "merge", "export",
        "schema",
    ]  # fmt: skip


def test_help_lists_every_command_under_its_heading(capsys: Capture) -> None:
    assert run(["--help"]) == 0
    text = capsys.readouterr().out
    for name, command in COMMANDS.items():
        assert name in text
        assert command.panel in text


def test_no_arguments_show_the_help(capsys: Capture) -> None:
    assert run([]) == 0
    assert "preview" in capsys.readouterr().out


def test_version(capsys: Capture) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"tunesmith {__version__}"


def test_module_runs_as_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tunesmith", "trian"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "error: there is no command trian\nhint: did you mean train?\n"


def test_schema_prints_json_and_nothing_else(capsys: Capture) -> None:
    assert run(["schema"]) == 0
    captured = capsys.readouterr()
    assert "optim" in json.loads(captured.out)["properties"]
    assert captured.err == ""


def test_closed_pipe_is_quiet() -> None:
    command = f"{sys.executable} -m tunesmith schema | head -c 1"
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.stdout == "{"
    assert done.stderr == ""


def test_init_writes_once(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "my.yaml"
    assert run(["init", str(path), "--model", "M", "--data", "a.jsonl", "--data", "b.jsonl"]) == 0
    assert capsys.readouterr().out == ""
    recipe = recipe_from_arguments([str(path)])
    assert recipe.model.name == "M"
    assert [source.path for source in recipe.data.train] == ["a.jsonl", "b.jsonl"]
    path.write_text("mine")
    assert run(["init", str(path)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert path.read_text() == "mine"
    assert run(["init", str(tmp_path / "none" / "x.yaml")]) == 2


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["schema", "--learning_rate", "1e-4"], ["optim.lr=1e-4"]),
        (["schema", "--num-train-epochs=3"], ["train.epochs=3"]),
        (["schema", "--lora_r", "8", "--cutoff_len", "99"], ["adapter.rank=8", "max_length=99"]),
        (["schema", "--per_device_train_batch_size", "4"], ["batch.documents", "micro_tokens"]),
        (["schema", "--optim.lr", "3"], ["optim.lr=3"]),
        (["init", "--modle", "M"], ["did you mean --model?"]),
        (["schema", "--zzqqxx"], ["no option --zzqqxx"]),
        (["--zzqqxx"], ["no option --zzqqxx"]),
        (["init", "a", "b"], ["unexpected extra argument"]),
        (["init", "--model"], ["--model"]),
        (["chatt"], ["did you mean chat?"]),
    ],
)
def test_wrong_usage_is_one_clear_error(
    arguments: list[str], parts: list[str], capsys: Capture
) -> None:
    assert run(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert "Traceback" not in captured.err
    assert all(part in captured.err for part in parts), captured.err


def raising(error: BaseException) -> object:
    raise error


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DataError("bad", where="a.jsonl:3", hint="mend it"), 2),
        (RunError("bad"), 1),
        (InterruptedRun("saved", signal_number=2), 130),
        (InterruptedRun("saved", signal_number=15), 143),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_codes(error: BaseException, code: int, capsys: Capture) -> None:
    assert run_command(lambda: raising(error), []) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")


def test_error_shows_place_and_hint(capsys: Capture) -> None:
    run_command(lambda: raising(DataError("bad", where="a.jsonl:3", hint="mend it")), [])
    assert capsys.readouterr().err == "error: a.jsonl:3: bad\nhint: mend it\n"


def test_our_own_bugs_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: raising(ZeroDivisionError()), [])


def test_arguments_are_a_recipe_and_overrides(tmp_path: Path) -> None:
    assert split_arguments(["r.yaml", "optim.lr=1"]) == ("r.yaml", ["optim.lr=1"])
    assert split_arguments(["optim.lr=1", "RUN"]) == ("RUN", ["optim.lr=1"])
    assert split_arguments([]) == (None, [])
    odd = tmp_path / "lr=3.yaml"
    odd.write_text("model: M\n")
    assert split_arguments([str(odd)]) == (str(odd), [])
    with pytest.raises(RecipeError, match="second recipe"):
        split_arguments(["a.yaml", "b.yaml"])


def test_options_stand_for_keys_and_overrides_come_last(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("model: A\ndata: {train: a.jsonl, columns: {prompt: q}}\n")
    recipe = recipe_from_arguments([str(path), "optim.lr=1e-4"], model="B", data=["b", "c"])
    assert recipe.model.name == "B"
    assert [source.path for source in recipe.data.train] == ["b", "c"]
    assert recipe.data.columns == {"prompt": "q"}
    assert recipe.optim.lr == 1e-4
    assert recipe_from_arguments(["model=C"], model="B", data=["b"]).model.name == "C"


def test_eval_option_reads_shares_counts_files_and_sets() -> None:
    def read(text: str) -> object:
        return recipe_from_arguments([], model="M", data=["a"], eval=text).data.eval

    assert read("2%") == Holdout(share=0.02)
    assert read("200") == Holdout(rows=200)
    assert list(read("dev.jsonl")) == ["eval"]  # type: ignore[call-overload]
    assert list(read("{x: a, y: b}")) == ["x", "y"]  # type: ignore[call-overload]


def test_missing_model_or_data_is_said() -> None:
    with pytest.raises(RecipeError, match="--data"):
        recipe_from_arguments([], model="M")
    with pytest.raises(RecipeError, match="--model"):
        recipe_from_arguments([], data=["a"])
