"""`tunesmith doctor`: the page, the object, the exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tiny import tiny_tokenizer, write_jsonl
from tunesmith.cli.app import run
from tunesmith.doctor.catalogue import CHECKS

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A model's folder without weights: the doctor must not miss them."""
    folder = tmp_path / "model"
    tiny_tokenizer().save_pretrained(folder)
    config = {"max_position_embeddings": 512, "model_type": "llama", "vocab_size": 448}
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": 2}))
    return str(folder)


def rows(count: int = 60) -> list[dict]:
    return [
        {"prompt": f"What is {n} plus {n * 7}?", "completion": f"It is {n + n * 7}."}
        for n in range(count)
    ]


def test_a_clean_page_ends_with_0_and_has_a_line_for_each_check(
    model: str, tmp_path: Path, capsys: Capture
) -> None:
    data = str(write_jsonl(tmp_path / "clean.jsonl", rows()))
    assert run(["doctor", "--model", model, "--data", data]) == 0
    page = capsys.readouterr().out
    for check in CHECKS.values():
        assert page.count(check.title) == 1
    assert "0 errors, 0 warnings" in page
    assert "\x1b" not in page
    assert "60, 60 of them used in training" in page


def test_json_is_one_object_with_every_check(model: str, tmp_path: Path, capsys: Capture) -> None:
    data = write_jsonl(tmp_path / "d.jsonl", rows())
    with data.open("a") as file:
        file.write('{"prompt": "What?", "completion": ""}\n{"prompt": \n')
    assert run(["doctor", "--model", model, "--data", str(data), "--json"]) == 1
    captured = capsys.readouterr()
    page = json.loads(captured.out)
    assert captured.err == ""
    assert page["level"] == "error"
    assert [check["check"] for check in page["checks"]] == list(CHECKS)
    checks = {check["check"]: check for check in page["checks"]}
    empty = checks["empty-answers"]
    assert (empty["level"], empty["count"], empty["of"]) == ("error", 1, 62)
    assert empty["share"] == pytest.approx(1 / 62)
    assert empty["examples"][0]["where"] == f"{data}:60"
    assert empty["hint"]
    assert checks["unreadable-rows"]["examples"][0]["where"] == f"{data}:61"
    assert checks["duplicates"]["level"] == "ok"
    assert checks["duplicates"]["hint"] is None
    summary = page["summary"]
    assert (summary["rows"], summary["trained_rows"]) == (62, 60)
    assert summary["steps_per_epoch"] == 2
    assert summary["total_steps"] == 6
    assert summary["roles"] == {"user": 60, "assistant": 60}
    assert summary["length"]["p0"] <= summary["length"]["p50"] <= summary["length"]["p100"]
    assert 0 < summary["target_tokens"] < summary["tokens"]
    assert 0 < summary["shared_prefix_share"] < 1


def test_dropping_bad_rows_makes_them_warnings(model: str, tmp_path: Path, capsys: Capture) -> None:
    data = write_jsonl(tmp_path / "d.jsonl", [*rows(), {"prompt": "What?", "completion": ""}])
    arguments = ["doctor", "--model", model, "--data", str(data)]
    assert run(arguments) == 1
    page = capsys.readouterr().out
    assert f"{data}:60: `completion` is empty" in page
    assert "hint: take these rows out" in page
    assert "1 error, 0 warnings" in page
    assert run([*arguments, "data.bad_rows=drop"]) == 0
    assert "0 errors, 1 warning" in capsys.readouterr().out
    assert run([*arguments, "--strict", "data.bad_rows=drop"]) == 1


def test_rows_looks_at_the_first_rows_only(model: str, tmp_path: Path, capsys: Capture) -> None:
    data = write_jsonl(tmp_path / "d.jsonl", [*rows(), {"prompt": "What?", "completion": ""}])
    assert run(["doctor", "--model", model, "--data", str(data), "--rows", "50", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["summary"]["rows"] == 50


def test_held_out_files_and_shares_are_compared_with_the_rest(
    model: str, tmp_path: Path, capsys: Capture
) -> None:
    train = str(write_jsonl(tmp_path / "d.jsonl", rows()))
    held = str(write_jsonl(tmp_path / "e.jsonl", rows()[:5]))
    arguments = ["doctor", "--model", model, "--data", train, "--json"]

    def leakage() -> dict:
        page = json.loads(capsys.readouterr().out)
        return {**page["summary"]["held_out"], **{c["check"]: c for c in page["checks"]}["leakage"]}

    assert run([*arguments, "--eval", held]) == 1
    found = leakage()
    assert (found["eval"], found["count"], found["level"]) == (5, 5, "error")
    assert run([*arguments, "--eval", "10%"]) == 0
    found = leakage()
    assert (found["eval"], found["count"], found["of"]) == (6, 0, 6)


def test_wrong_input_ends_with_2(model: str, tmp_path: Path, capsys: Capture) -> None:
    assert run(["doctor", "--model", model, "--data", str(tmp_path / "none.jsonl")]) == 2
    assert "no such file" in capsys.readouterr().err
    assert run(["doctor", "--model", model]) == 2
    assert "no data" in capsys.readouterr().err


def test_a_terminal_gets_colours_and_lines_that_fit(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rich.console import Console

    from tunesmith.cli.doctor import show
    from tunesmith.cli.preview import open_template
    from tunesmith.config.read import read_recipe
    from tunesmith.doctor.examine import diagnose

    data = write_jsonl(tmp_path / "d.jsonl", [*rows(), {"prompt": "What?", "completion": ""}])
    recipe = read_recipe({"model": model, "data": str(data)})
    found = diagnose(recipe, open_template(recipe))
    for terminal in (True, False):
        with (tmp_path / "page").open("w+") as file:
            monkeypatch.setenv("TERM", "xterm-256color")
            show(found, Console(file=file, force_terminal=terminal, width=72, highlight=False))
            file.seek(0)
            page = file.read()
        assert ("\x1b[" in page) == terminal
        plain = "".join(part.split("m", 1)[-1] for part in page.split("\x1b["))
        longest = max(len(line) for line in plain.splitlines())
        assert (longest <= 72) == terminal


def test_every_check_is_documented() -> None:
    text = (Path(__file__).parents[2] / "docs/doctor.md").read_text(encoding="utf-8")
    assert [name for name in CHECKS if f"| `{name}` |" not in text] == []


def test_steps_are_those_of_the_mixture(model: str, tmp_path: Path, capsys: Capture) -> None:
    paths = [str(write_jsonl(tmp_path / f"{name}.jsonl", rows())) for name in "ab"]
    recipe = tmp_path / "recipe.yaml"
    train = [{"path": paths[0], "epochs": 3}, {"path": paths[1]}]
    recipe.write_text(json.dumps({"model": model, "data": {"train": train}}))
    assert run(["doctor", str(recipe), "batch.documents=10", "train.epochs=1", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)["summary"]
    assert summary["sources"] == dict.fromkeys(paths, 60)
    assert (summary["steps_per_epoch"], summary["total_steps"]) == (24, 24)
