"""Each line of `verify` holds on a sound model, and fails when the fault it is there for is
planted.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tiny import chat_rows, tiny_folder, write_jsonl
from tunesmith.build.job import Job
from tunesmith.cli.app import run as command
from tunesmith.config.read import read_recipe
from tunesmith.run import train
from tunesmith.types import Batch, Chain, Layout
from tunesmith.verify import exported, ranks
from tunesmith.verify import ledger as accounts
from tunesmith.verify.gradients import Learned, largest_difference
from tunesmith.verify.inference import examples, inference_faithful
from tunesmith.verify.layouts import Layouts, layout_checks
from tunesmith.verify.outcome import Outcome
from tunesmith.verify.resumed import resume_bitwise, run_through
from tunesmith.verify.table import markdown
from tunesmith.verify.verify import Verification, verify
from tunesmith.verify.workload import (
    STEPS,
    Bounds,
    bounded,
    build_precise,
    chosen_documents,
)

BOUNDS = Bounds(documents=4, rows=12)
PLAIN = {"data": {"shuffle": False}, "optim": {"lr": 1e-3}, "model": {"dtype": "float32"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("given")
    tiny_folder(place / "model", num_hidden_layers=2)
    write_jsonl(place / "rows.jsonl", chat_rows(16))
    return place


def recipe_of(folder: Path, **sections: Any):
    given = {
        name: {**PLAIN.get(name, {}), **sections.get(name, {})} for name in {*PLAIN, *sections}
    }
    given["model"] = {"name": str(folder / "model"), **given.get("model", {})}
    given["data"]["train"] = [str(folder / "rows.jsonl")]
    return read_recipe(given)


def precise(folder: Path, **sections: Any) -> Job:
    return build_precise(recipe_of(folder, **sections), BOUNDS, [])[0]


def layouts_of(job: Job) -> dict[str, Outcome]:
    subject = Layouts(job, chosen_documents(job, BOUNDS), "float32")
    return {outcome.name: outcome for outcome in layout_checks(subject)}


def verdicts(found: Verification) -> dict[str, str]:
    return {f"{o.promise} {o.name}": o.verdict for o in found.outcomes}


def test_everything_holds_on_a_sound_model(folder: Path) -> None:
    found = verify(recipe_of(folder), bounds=BOUNDS)
    seen = verdicts(found)
    assert seen.pop("P3 1 = N ranks") == "not checked"
    assert set(seen.values()) == {"holds"}, found.outcomes
    assert {name[:2] for name in seen} == {"P1", "P2", "P3", "P4", "P5", "P6"}
    by_name = {outcome.name: outcome for outcome in found.outcomes}
    assert by_name["inference-faithful"].counts["answers"] == 24
    tree = by_name["tree = flat"]
    assert tree.counts["computed"] < 0.7 * tree.counts["tokens"]
    assert by_name["packed = alone"].counts["parameters"] == sum(
        tensor.numel() for tensor in load_file(folder / "model" / "model.safetensors").values()
    )
    for outcome in found.outcomes:
        if outcome.tolerance:
            assert outcome.difference is not None
            assert 0 <= outcome.difference < outcome.tolerance / 10
    assert "all 9 checks hold" in markdown(found)


@pytest.mark.slow
def test_an_adapter_with_its_own_objective_holds_on_two_ranks_too(folder: Path) -> None:
    recipe = recipe_of(folder, adapter={"kind": "lora", "rank": 4}, objective={"name": "dft"})
    found = verify(recipe, bounds=BOUNDS, ranks=2)
    assert set(verdicts(found).values()) == {"holds"}, found.outcomes
    assert found.outcomes[1].counts["parameters"] < 20_000


KINDS: dict[str, dict[str, dict[str, Any]]] = {
    **{kind: {"adapter": {"kind": kind, "rank": 4}} for kind in ("pissa", "olora", "dora")},
    "rslora": {"adapter": {"kind": "rslora", "rank": 4}, "model": {"dtype": "bfloat16"}},
    **{
        f"lora, {kept}": {
            "adapter": {"kind": "lora", "rank": 4}, "model": {"quantization": kept}
        }
        for kept in ("nf4", "int8")
    },
    "dora, nf4": {
        "adapter": {"kind": "dora", "rank": 4},
        "model": {"quantization": "nf4", "dtype": "bfloat16"},
    },
    "loftq, nf4": {"adapter": {"kind": "loftq", "rank": 4}, "model": {"quantization": "nf4"}},
    **{kind: {"adapter": {"kind": kind}} for kind in ("vera", "oft", "ia3", "loha", "hra", "miss")},
}  # fmt: skip
FEW = Bounds(documents=2, rows=5)


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=[] if kind in ("pissa", "lora, nf4") else pytest.mark.slow)
        for kind in KINDS
    ],
)
def test_every_kind_of_adapter_and_base_holds(folder: Path, kind: str) -> None:
    """On a quantised base the folder is judged on that base, and how far the plain one is from it
    is said.
    """
    sections = KINDS[kind]
    kept = sections.get("model", {}).get("quantization", "none")
    if kept != "none":
        pytest.importorskip("bitsandbytes")
    found = verify(recipe_of(folder, **sections), bounds=FEW)
    seen = verdicts(found)
    assert seen.pop("P3 1 = N ranks") == "not checked"
    assert set(seen.values()) == {"holds"}, found.outcomes
    line = next(outcome for outcome in found.outcomes if outcome.name == "export = trained")
    if kept == "none":
        assert line.note == ""
        return
    assert line.counts["quantised maps"] == 14
    assert "on the plain base" in line.note
    assert float(line.note.split("logits are ")[1].split()[0]) > 10 * line.difference


def test_a_fault_in_an_adapter_on_a_quantised_base_fails_p6(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Far less than what the plain base differs by."""
    pytest.importorskip("bitsandbytes")
    own = exported.write

    def other_scale(job: Job, place: Path) -> None:
        own(job, place)
        edited("adapter_config.json", lambda c: c.update(lora_alpha=c["lora_alpha"] * 1.5))(place)

    monkeypatch.setattr(exported, "write", other_scale)
    from tunesmith.verify import verify as examine

    monkeypatch.setattr(examine, "write", other_scale)
    recipe = recipe_of(folder, **KINDS["lora, nf4"], optim={"lr": 0.02})
    found = verify(recipe, bounds=FEW)
    assert {name for name, seen in verdicts(found).items() if seen == "fails"} == {
        "P6 export = trained"
    }


@pytest.mark.parametrize(
    "sections",
    [{"train_on": "all"}, {"train_on": "last"}, {"template": "none"}],
    ids=["all", "last", "raw"],
)
def test_inference_is_followed_however_rows_are_learned(
    folder: Path, tmp_path: Path, sections: dict[str, str]
) -> None:
    place = tmp_path / "given"
    shutil.copytree(folder, place)
    if sections.get("template") == "none":
        write_jsonl(
            place / "rows.jsonl",
            [{"prompt": f"{n} plus {n}:", "completion": f" {2 * n}"} for n in range(9)],
        )
    job = precise(place, data=sections)
    outcome = inference_faithful(job, [])
    assert outcome.verdict == "holds", outcome
    assert outcome.counts["targets"] > 20


# Faults of rendering.


def _early_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    from tunesmith.data.rendering import render

    own = render._first_stop

    def before(ids: Any, template: Any) -> int | None:
        place = own(ids, template)
        return None if place is None else place - 1

    monkeypatch.setattr(render, "_first_stop", before)


def _late_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    from tunesmith.data.rendering import render

    own = render._first_stop
    monkeypatch.setattr(render, "_first_stop", lambda ids, template: (own(ids, template) or 0) + 1)


def _path_of(monkeypatch: pytest.MonkeyPatch, change: Callable[[Any, Any], Any]) -> None:
    """Answers are learned as another prompt and target."""
    from tunesmith.data.rendering import render

    own = render._path

    def changed(turn: Any, prompt: Any, target: Any, template: Any) -> Any:
        return own(turn, *change(prompt, target), template)

    monkeypatch.setattr(render, "_path", changed)


def _moved_boundary(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first token of an answer is given as prompt."""
    _path_of(monkeypatch, lambda p, t: (np.concatenate([p, t[:1]]), t[1:]))


def _forgotten_history(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers are learned without the beginning of what is before them."""
    _path_of(monkeypatch, lambda p, t: (p[4:], t))


def _missing_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    from tunesmith.data.rendering import turns

    own = turns.choose_turns
    monkeypatch.setattr(turns, "choose_turns", lambda chat, train_on: own(chat, train_on)[-1:])


def _other_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    from tunesmith.data.rendering import turns

    own = turns.choose_turns
    monkeypatch.setattr(
        turns, "choose_turns", lambda c, t: [(number, 0.5) for number, _ in own(c, t)]
    )


@pytest.mark.parametrize(
    "plant",
    [_early_stop, _late_stop, _moved_boundary, _forgotten_history, _missing_turns, _other_weights],
)
def test_a_fault_of_rendering_fails_p1(
    folder: Path, monkeypatch: pytest.MonkeyPatch, plant: Callable[[pytest.MonkeyPatch], None]
) -> None:
    plant(monkeypatch)
    outcome = inference_faithful(precise(folder), [])
    assert outcome.failed
    assert "rows.jsonl:" in outcome.note
    assert "preview" in outcome.advice


# Faults of layouts.


def _collated(monkeypatch: pytest.MonkeyPatch, change: Callable[[Batch], Batch]) -> None:
    from tunesmith.train import loss

    own = loss.collate
    monkeypatch.setattr(loss, "collate", lambda plan, device=None: change(own(plan, device)))


def _leak(batch: Batch) -> Batch:
    """Every token sees all before it."""
    assert batch.layout is not None
    count = len(batch.layout.position)
    layout = Layout(
        (Chain(0, count, ()),), np.full(count, count, np.int32), np.arange(count, dtype=np.int32)
    )
    return dataclasses.replace(batch, layout=layout)


def _blind_branches(batch: Batch) -> Batch:
    """Branches don't see the prefix they continue."""
    assert batch.layout is not None
    if batch.layout.flat:
        return batch
    chains = tuple(Chain(chain.start, chain.end, ()) for chain in batch.layout.chains)
    return dataclasses.replace(batch, layout=dataclasses.replace(batch.layout, chains=chains))


def _shifted(batch: Batch) -> Batch:
    """Targets are predicted from one token too early."""
    return dataclasses.replace(batch, source=(batch.source - 1).clamp_min(0))


def test_a_leak_between_documents_fails_p2_and_p3(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _collated(monkeypatch, _leak)
    found = layouts_of(precise(folder))
    assert found["packed = alone"].failed
    assert found["any micro-batches"].failed
    assert "unpacked" in found["packed = alone"].advice


def test_branches_without_their_prefix_fail_the_tree_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _collated(monkeypatch, _blind_branches)
    found = layouts_of(precise(folder))
    assert found["tree = flat"].failed
    assert not found["packed = alone"].failed


def test_targets_that_are_shifted_fail_p2(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _collated(monkeypatch, _shifted)
    found = layouts_of(precise(folder))
    assert found["packed = alone"].failed
    assert found["tree = flat"].failed


def test_a_mean_of_means_fails_p3_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each micro-batch is divided by its own share of the weight."""
    from tunesmith.train import step

    own = step._total_weight
    monkeypatch.setattr(step, "_total_weight", lambda plans, reduce: own(plans[:1], reduce))
    found = layouts_of(precise(folder))
    assert found["any micro-batches"].failed
    assert not found["packed = alone"].failed


def test_a_wrong_weight_of_a_target_fails_p2(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def heavier(batch: Batch) -> Batch:
        weight = batch.weight.clone()
        weight[0] *= 1.01
        return dataclasses.replace(batch, weight=weight)

    _collated(monkeypatch, heavier)
    assert layouts_of(precise(folder))["packed = alone"].failed


def test_a_model_that_runs_one_path_at_a_time_is_not_said_to_share(folder: Path) -> None:
    found = layouts_of(precise(folder, device={"attention": "unpacked"}))
    assert found["tree = flat"].verdict == "not checked"
    assert found["packed = alone"].verdict == "holds"


def test_differences_that_are_no_numbers_are_the_largest() -> None:
    sound = Learned(1.0, np.ones(2), {"a": torch.ones(3), "b": torch.ones(3)}, 1)
    broken = dataclasses.replace(
        sound, gradients={"a": torch.ones(3) * 2, "b": torch.full((3,), np.nan)}
    )
    value, name = largest_difference(broken, sound)
    assert value != value
    assert "gradient of b" in name
    missing = dataclasses.replace(sound, gradients={"a": torch.ones(3)})
    assert largest_difference(missing, sound) == (1.0, "the gradient of b")
    assert largest_difference(sound, missing)[0] == pytest.approx(1.0)


# Faults of the ledger.


def test_a_ledger_that_miscounts_fails_p4(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = precise(folder)
    assert not accounts.ledger_adds_up(job, []).failed
    counts = next(iter(job.data.prepared.ledger.sources.values()))
    for change in ({"rows": 1, "rows_trained": 1}, {"tokens": 1, "tokens_trained": 1}, {"rows": 1}):
        before = {name: getattr(counts, name) for name in change}
        for name, value in change.items():
            setattr(counts, name, before[name] + value)
        assert accounts.ledger_adds_up(job, []).failed, change
        for name, value in before.items():
            setattr(counts, name, value)


# Faults of resuming.


def test_a_resume_that_forgets_fails_p5(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tunesmith.build.build import build
    from tunesmith.checkpoint import manager
    from tunesmith.data.sampling.sampler import BatchSampler
    from tunesmith.optim import Optimizer

    recipe = bounded(recipe_of(folder, adapter={"kind": "lora", "rank": 4, "dropout": 0.1}), BOUNDS)
    run_through(build(recipe), tmp_path / "run")

    def again() -> Outcome:
        found = resume_bitwise(lambda: build(recipe), tmp_path / "run")
        shutil.rmtree(tmp_path / "run-again")
        return found

    assert again().verdict == "holds"
    with monkeypatch.context() as patch:
        own = Optimizer.load_state_dict

        def without_moments(self: Any, state: Any) -> None:
            own(self, {k: v * 0 if k.startswith("exp_avg.") else v for k, v in state.items()})
            assert any(k.startswith("exp_avg.") for k in state), sorted(state)[:9]

        patch.setattr(Optimizer, "load_state_dict", without_moments)
        assert again().failed
    with monkeypatch.context() as patch:
        patch.setattr(manager, "restore_rng", lambda state: None)
        assert again().failed  # dropout draws other numbers
    with monkeypatch.context() as patch:
        indices = BatchSampler.step_indices
        patch.setattr(BatchSampler, "step_indices", lambda self, n: indices(self, n)[::-1])
        assert again().failed


# Faults of exporting.


@pytest.fixture(scope="module")
def written(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, Path]:
    from tunesmith.build.build import build

    place = tmp_path_factory.mktemp("written")
    job = build(bounded(recipe_of(folder), BOUNDS))
    run_through(job, place / "run")
    exported.write(job, place / "model")
    return job, place / "model"


def checked(written: tuple[Job, Path], copy: Path) -> dict[str, Outcome]:
    job = written[0]
    documents = chosen_documents(job, BOUNDS)
    chats = [example for _, example in examples(job, [])]
    subject = exported.Exported(job, copy, "a copy")
    return {o.name: o for o in exported.export_checks(subject, documents, chats)}


def edited(file: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        values = json.loads((folder / file).read_text())
        change(values)
        (folder / file).write_text(json.dumps(values))

    return edit


def _perturb(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if "mlp" in name)
    tensors[name][0, 0] += 1e-6
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _other_template(folder: Path) -> None:
    file = folder / "chat_template.jinja"
    file.write_text(file.read_text().replace("<|im_start|>", "<|im_start|> "))


@pytest.mark.parametrize(
    ("plant", "line"),
    [
        (_perturb, "export = trained"),
        (edited("config.json", lambda c: c.update(rms_norm_eps=1e-3)), "export = trained"),
        (lambda folder: (folder / "config.json").unlink(), "export = trained"),
        (_other_template, "ids and stop tokens"),
        (
            edited("generation_config.json", lambda c: c.update(eos_token_id=0)),
            "ids and stop tokens",
        ),
        (
            edited("tokenizer.json", lambda t: t["pre_tokenizer"].update(add_prefix_space=True)),
            "ids and stop tokens",
        ),
    ],
    ids=["weights", "config", "unreadable", "template", "stops", "tokenizer"],
)
def test_a_fault_of_the_folder_fails_p6(
    written: tuple[Job, Path], tmp_path: Path, plant: Callable[[Path], None], line: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(written[1], copy)
    assert not any(outcome.failed for outcome in checked(written, copy).values())
    plant(copy)
    found = checked(written, copy)
    assert found[line].failed
    assert found[line].advice


# Ranks.


@pytest.mark.parametrize("fault", ["none", "loss", "norm", "code"])
def test_ranks_that_learn_otherwise_fail(
    written: tuple[Job, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    job, model = written
    alone = tmp_path / "run"
    shutil.copytree(model.parent / "run", alone)

    def instead(given: list[str], **_: Any) -> Any:
        copy = Path(given[-1])
        shutil.copytree(alone, copy)
        file = copy / "checkpoints" / f"step-{STEPS}" / "model.safetensors"
        tensors = load_file(file)
        if fault in ("loss", "norm"):
            tensors["rows.loss" if fault == "loss" else "spikes.grad_norm"][-1] *= 1.01
        save_file(tensors, file)
        return subprocess.CompletedProcess(given, fault == "code", "", "x\nerror: rank 1 is gone\n")

    monkeypatch.setattr(ranks.subprocess, "run", instead)
    found = ranks.ranks_agree(job.choices.recipe, alone, ranks=2, folders=[], precise=True)
    assert found.failed == (fault != "none")
    if fault == "code":
        assert "rank 1 is gone" in found.note


# The command.


def test_the_command_says_what_fails_and_ends_with_1(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--model", str(folder / "model"), "--data", str(folder / "rows.jsonl")]
    few = ["--documents", "2", "--rows", "5"]
    _collated(monkeypatch, _leak)
    assert command(["verify", *given, *few]) == 1
    said = capsys.readouterr().out
    assert "packed = alone            fails" in said
    assert "hint: train with device.attention=unpacked" in said
    assert "P2 packed = alone" in said.splitlines()[-1]


def test_a_run_keeps_its_table_and_its_own_model_is_looked_at(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    train(
        model={"name": str(folder / "model"), "dtype": "float32"},
        data=str(folder / "rows.jsonl"), out=run, progress=False,
        batch=4, train={"epochs": 1}, optim={"lr": 1e-3},
    )  # fmt: skip
    few = ["--documents", "2", "--rows", "5"]
    assert command(["verify", str(run), *few, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert json.loads((run / "verify.json").read_text())["promises"] == record["promises"]
    assert record["holds"] is True
    page = (run / "verify.md").read_text()
    assert "all 10 checks hold, 1 not made" in page
    assert "model/ of the run, and step-4" in page
    by_name = {line["name"]: line for line in record["promises"]}
    assert by_name["the run's ledger adds up"]["counts"]["rows"] == 16
    _perturb(run / "model")
    ledger = json.loads((run / "ledger.json").read_text())
    ledger["totals"]["rows"] += 1
    (run / "ledger.json").write_text(json.dumps(ledger))
    assert command(["verify", str(run), *few, "--out", str(tmp_path / "out")]) == 1
    failed = json.loads((tmp_path / "out" / "verify.json").read_text())
    names = {line["name"] for line in failed["promises"] if line["verdict"] == "fails"}
    assert names == {"export = trained", "the run's ledger adds up"}


def test_wrong_input_ends_with_2(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["verify", "--model", str(folder / "model")]) == 2
    assert "data.train" in capsys.readouterr().err
