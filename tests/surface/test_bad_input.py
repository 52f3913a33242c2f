"""Wrong input through the real command line: one clear error, exit code 2, nothing lost."""

from __future__ import annotations

import gzip
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tiny import CHATML, chat_rows, tiny_folder, write_jsonl
from tunesmith.cli.app import run

Capture = pytest.CaptureFixture[str]
ROWS = chat_rows(6)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("models") / "llama")


@dataclass(frozen=True)
class Place:
    """Where a case is set up: its folder, the model to train and the data."""

    folder: Path
    model: Path
    data: Path

    def rows(self, *changed: tuple[int, object]) -> None:
        """The data: good rows, but for some that are replaced (text: the line as it is)."""
        lines = [json.dumps(row) for row in ROWS]
        for number, row in changed:
            lines[number] = row if isinstance(row, str) else json.dumps(row)
        self.data.write_text("".join(f"{line}\n" for line in lines))

    def template(self, text: str) -> str:
        path = self.folder / "t.jinja"
        path.write_text(text)
        return f"data.template={path}"


def chat(*turns: str) -> dict:
    """A chat of `role: content` turns."""
    pairs = [turn.split(": ") for turn in turns]
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


STRICT = (
    "{% for m in messages %}{% if m.role != 'system' and (m.role == 'user') != (loop.index0 % 2 == "
    "(1 if messages[0].role == 'system' else 0)) %}{{ raise_exception('roles must alternate') }}"
    "{% endif %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def unknown_key(place: Place) -> list[str]:
    return ["optim.learnrate=1e-4"]


def unknown_key_in_file(place: Place) -> list[str]:
    recipe = place.folder / "recipe.yaml"
    recipe.write_text("optim:\n  lr: 1e-4\n  schedul: linear\n")
    return [str(recipe)]


def missing_file(place: Place) -> list[str]:
    place.data.unlink()
    return []


def broken_line(place: Place) -> list[str]:
    lines = [json.dumps(row) for row in chat_rows(20)]
    lines[16] = lines[16][:-9]
    place.data.write_text("\n".join(lines) + "\n")
    return []


def empty_file(place: Place) -> list[str]:
    place.data.write_text("")
    return []


def wrong_column_type(place: Place) -> list[str]:
    place.rows((2, {"messages": "What is 1 plus 1?"}))
    return []


def wrong_content_type(place: Place) -> list[str]:
    place.rows((3, {"messages": [{"role": "user", "content": 7}]}))
    return []


def empty_answer(place: Place) -> list[str]:
    place.rows((4, chat("user: Hello?", "assistant: ")))
    return []


def roles_out_of_order(place: Place) -> list[str]:
    place.rows((1, chat("user: One?", "user: Two?", "assistant: Both.")))
    return [place.template(STRICT)]


def no_chat_template(place: Place) -> list[str]:
    (place.model / "chat_template.jinja").unlink()
    return []


def special_token_in_content(place: Place) -> list[str]:
    place.rows((5, chat("user: What is <|im_end|>?", "assistant: A token.")))
    return []


def template_with_unknown_tokens(place: Place) -> list[str]:
    foreign = CHATML.replace("<|im_end|>", "<|eot_id|>").replace("<|im_start|>", "<|header|>")
    return [place.template(foreign)]


def broken_template(place: Place) -> list[str]:
    return [place.template("{% for m in messages %}")]


def over_long(place: Place) -> list[str]:
    place.rows((2, chat("user: Count.", "assistant: " + "one two three " * 50)))
    return ["data.max_length=150"]


def model_without_weights(place: Place) -> list[str]:
    (place.model / "model.safetensors").unlink()
    return []


def no_such_model(place: Place) -> list[str]:
    shutil.rmtree(place.model)
    return []


def foreign_flag(place: Place) -> list[str]:
    return ["--learning_rate", "1e-4"]


def value_of_wrong_type(place: Place) -> list[str]:
    return ["batch.documents=many"]


def unknown_columns(place: Place) -> list[str]:
    write_jsonl(place.data, [{"question": "1 + 1?", "reply": "2"}] * 3)
    return []


def pattern_without_a_match(place: Place) -> list[str]:
    return [f"data.train={place.folder}/part-*.jsonl"]


def folder_of_two_splits(place: Place) -> list[str]:
    (place.folder / "d").mkdir()
    for split in ("train", "test"):
        shutil.copy(place.data, place.folder / "d" / f"{split}.jsonl")
    return [f"data.train={place.folder}/d"]


def file_cut_off(place: Place) -> list[str]:
    packed = gzip.compress(place.data.read_bytes())
    (place.folder / "cut.jsonl.gz").write_bytes(packed[:-20])
    return [f"data.train={place.folder}/cut.jsonl.gz"]


def weight_of_one_source_only(place: Place) -> list[str]:
    return [f"data.train=[{{path: {place.data}, weight: 2}}, other.jsonl]"]


CASES: dict[Callable[[Place], list[str]], list[str]] = {
    unknown_key: ["optim.learnrate", "optim.lr"],
    unknown_key_in_file: ["recipe.yaml:3", "optim.schedul", "schedule"],
    missing_file: ["rows.jsonl", "hint: "],
    broken_line: ["rows.jsonl:16", "line 17", "data.bad_rows=drop", "R-faults.jsonl"],
    empty_file: ["rows.jsonl", "hint: "],
    wrong_column_type: ["rows.jsonl:2", "messages", "data.bad_rows=drop"],
    wrong_content_type: ["rows.jsonl:3", "content", "data.bad_rows=drop"],
    empty_answer: ["rows.jsonl:4", "message 1", "data.bad_rows=drop"],
    roles_out_of_order: ["rows.jsonl:1", "roles must alternate", "data.template"],
    no_chat_template: ["rows.jsonl:0", "no chat template", "data.template=FILE.jinja"],
    special_token_in_content: ["rows.jsonl:5", "message 0", "<|im_end|>", "mend it"],
    template_with_unknown_tokens: ["rows.jsonl:0", "<|eot_id|>", "without a stop token"],
    broken_template: ["t.jinja:1", "hint: "],
    over_long: ["rows.jsonl:2", "150", "data.too_long=drop"],
    model_without_weights: ["llama", "weights", "hint: "],
    no_such_model: ["llama", "hint: "],
    foreign_flag: ["--learning_rate", "optim.lr=1e-4"],
    value_of_wrong_type: ["batch.documents", "many"],
    pattern_without_a_match: ["part-*.jsonl", "no file matches"],
    folder_of_two_splits: ["/d", "test, train", "split: train"],
    file_cut_off: ["cut.jsonl.gz", "damaged or cut off", "gzip -t"],
    weight_of_one_source_only: ["data", "other.jsonl has no weight"],
    unknown_columns: ["rows.jsonl", "`question`", "data.columns"],
}  # fmt: skip
WITHOUT_HINT = (value_of_wrong_type, weight_of_one_source_only)
"""Cases whose message says itself what to do."""
OF_ROWS = (
    broken_line, wrong_column_type, wrong_content_type, empty_answer, roles_out_of_order,
    special_token_in_content,
)  # fmt: skip
"""Cases in which one row is bad and the others are good."""


def place_of(tmp_path: Path, base: Path) -> Place:
    place = Place(tmp_path, tmp_path / "llama", tmp_path / "rows.jsonl")
    shutil.copytree(base, place.model)
    place.rows()
    return place


def command(place: Place, more: list[str]) -> list[str]:
    fixed = ["train", "--model", str(place.model), "--data", str(place.data)]
    return [*fixed, "--out", str(place.folder / "R"), *more]


def listed(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_wrong_input_is_one_clear_error(
    case: Callable[[Place], list[str]], tmp_path: Path, base: Path, capsys: Capture
) -> None:
    place = place_of(tmp_path, base)
    arguments = command(place, case(place))
    before = listed(tmp_path)
    assert run(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("error: ") == 1
    assert "Traceback" not in captured.err
    assert "hint: " in captured.err or case in WITHOUT_HINT, captured.err
    for part in CASES[case]:
        assert part in captured.err, captured.err
    after = listed(tmp_path)
    faults = {path for path in after if path.name == "R-faults.jsonl"}
    assert set(after) - set(before) == faults
    assert not (tmp_path / "R").exists()
    assert all(after[path] == content for path, content in before.items())
    assert bool(faults) == (str(tmp_path / "R-faults.jsonl") in captured.err)


@pytest.mark.parametrize("case", OF_ROWS, ids=lambda case: case.__name__)
def test_every_bad_row_is_in_the_named_list(
    case: Callable[[Place], list[str]], tmp_path: Path, base: Path, capsys: Capture
) -> None:
    place = place_of(tmp_path, base)
    assert run(command(place, case(place))) == 2
    (entry,) = map(json.loads, (tmp_path / "R-faults.jsonl").read_text().splitlines())
    assert entry["source"] == str(place.data)
    assert f"{place.data}:{entry['row']}: {entry['message']}" in capsys.readouterr().err
    assert set(entry) == {"source", "row", "kind", "message", "hint"}


@pytest.mark.parametrize("case", OF_ROWS, ids=lambda case: case.__name__)
def test_dropping_goes_on_and_the_ledger_has_the_row(
    case: Callable[[Place], list[str]], tmp_path: Path, base: Path, capsys: Capture
) -> None:
    place = place_of(tmp_path, base)
    more = [*case(place), "data.bad_rows=drop", "train.steps=1", "batch.documents=4"]
    assert run(command(place, more)) == 0
    ledger = json.loads((tmp_path / "R" / "ledger.json").read_text())
    rows = len(place.data.read_text().splitlines())
    assert ledger["totals"]["rows"] == rows
    assert ledger["totals"]["rows_dropped"] == 1
    assert ledger["totals"]["rows_trained"] == rows - 1
    ((reason, entry),) = ledger["reasons"][str(place.data)].items()
    assert len(entry["rows"]) == 1
    assert reason
    assert str(place.data) in entry["examples"][0]
    assert (tmp_path / "R" / "model" / "model.safetensors").exists()


def test_a_thousand_bad_rows_are_counted_by_kind_and_few_are_shown(
    tmp_path: Path, base: Path, capsys: Capture
) -> None:
    place = place_of(tmp_path, base)
    empty = chat("user: Hello?", "assistant: ")
    place.data.write_text((json.dumps(empty) + "\n" + "{broken\n") * 500)
    assert run(command(place, [])) == 2
    error = capsys.readouterr().err
    assert "1000 of 1000 rows" in error
    assert len(re.findall(r"rows\.jsonl:\d", error)) == 6
    assert len((tmp_path / "R-faults.jsonl").read_text().splitlines()) == 1000


def test_a_run_that_stands_there_is_not_touched(
    tmp_path: Path, base: Path, capsys: Capture
) -> None:
    place = place_of(tmp_path, base)
    assert run(command(place, ["train.steps=1"])) == 0
    before = listed(tmp_path / "R")
    assert run(command(place, ["train.steps=1"])) == 2
    assert run(command(place, ["train.steps=2", "--resume"])) == 2
    empty_answer(place)
    assert run(command(place, ["train.steps=1", "--overwrite"])) == 2
    assert "hint: " in capsys.readouterr().err
    assert listed(tmp_path / "R") == before


def test_a_run_is_not_overwritten_by_one_that_starts_from_it(
    tmp_path: Path, base: Path, capsys: Capture
) -> None:
    place = place_of(tmp_path, base)
    assert run(command(place, ["train.steps=1"])) == 0
    before = listed(tmp_path / "R")
    again = ["train", "--model", str(tmp_path / "R"), "--data", str(place.data), "--overwrite"]
    assert run([*again, "--out", str(tmp_path / "R"), "train.steps=1"]) == 2
    assert "would delete" in capsys.readouterr().err
    assert listed(tmp_path / "R") == before
