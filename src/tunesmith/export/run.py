"""One export: find the model, merge its adapter if the form needs it, write, check."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tunesmith.data.templates.load import load_template
from tunesmith.data.templates.template import Template
from tunesmith.errors import ModelError, RunError
from tunesmith.export.card import TemplateChoice, read_choice
from tunesmith.export.folder import copy_subfolders
from tunesmith.export.gguf import QUANTIZATIONS, GgufReport, export_gguf
from tunesmith.export.hub import files_to_push, is_allowed
from tunesmith.export.merge import Part, merge_adapters
from tunesmith.export.ollama import find_family, write_modelfile
from tunesmith.model.load import load_causal_lm
from tunesmith.model.model_files import inside, weight_files
from tunesmith.model.source import ModelSource, resolve_model

FORMS = ("hf", "adapter", "gguf", "ollama")
Status = Callable[[str], None]


def export(
    name: str, to: str, out: Path, *, quantize: str = "f16", trust: bool = False, on_status: Status
) -> dict[str, Any]:
    """Write folder `out` with the model `name` in the form asked for; it appears whole or not at
    all. The result says what was written and measured.

    Raises:
        ModelError: the model can't be had in this form.
        RunError: the folder can't be written.
    """
    if to not in FORMS:
        raise ModelError(f"{to!r} is no form of export", hint=f"there are {', '.join(FORMS)}")
    if quantize not in QUANTIZATIONS:
        raise ModelError(f"{quantize!r} is unknown", hint=f"there are {', '.join(QUANTIZATIONS)}")
    if out.exists():
        raise ModelError("exists already", where=str(out), hint="another --out")
    source = resolve_model(name)
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=out.absolute().parent, prefix=".exporting-"))
    try:
        folder = temporary / out.absolute().name
        result = _fill(source, to, folder, quantize=quantize, trust=trust, on_status=on_status)
        folder.rename(out)
    except OSError as error:
        raise RunError(f"can't be written: {error}", where=str(out)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return {"out": str(out), "to": to, **result}


def _fill(
    source: ModelSource, to: str, folder: Path, *, quantize: str, trust: bool, on_status: Status
) -> dict[str, Any]:
    if to == "adapter":
        if source.adapter_folder is None:
            raise ModelError("holds a whole model, no adapter", where=source.name, hint="--to hf")
        return _copy(source.adapter_folder, folder)
    with _merged(source, folder, trust, on_status) as whole:
        if to == "hf":
            return _copy(whole.folder, folder)
        return _gguf(whole, to, folder, quantize=quantize, trust=trust, on_status=on_status)


@contextmanager
def _merged(
    source: ModelSource, folder: Path, trust: bool, on_status: Status
) -> Iterator[ModelSource]:
    """The model without an adapter."""
    if source.adapter_folder is None:
        yield source
        return
    on_status(f"merging {source.adapter_folder} into {source.folder}")
    merged = folder.parent / "merged" / folder.name  # the model card has the folder's name
    merge_adapters([Part(source)], merged, trust_remote_code=trust)
    yield resolve_model(str(merged))


def _copy(source: Path, folder: Path) -> dict[str, Any]:
    """The folder's files that belong to a model, and nothing else that lies there."""
    folder.mkdir()
    names = [*files_to_push_or_code(source)]
    for name in names:
        shutil.copyfile(source / name, folder / name)
    copy_subfolders(source, folder)
    return {"files": sorted(names)}


def files_to_push_or_code(folder: Path) -> list[str]:
    """What `push` may send, and the Python files of a model with code of its own."""
    linked = [
        path.name
        for path in folder.iterdir()
        if path.is_symlink() and path.is_file() and inside(folder, path) and is_allowed(path.name)
    ]  # a snapshot of the hub's cache is links
    code = [path.name for path in folder.glob("*.py") if inside(folder, path)]
    weights = [path.name for path in weight_files(folder) if inside(folder, path)]
    return sorted({*files_to_push(folder), *linked, *code, *weights})


def _gguf(
    source: ModelSource, to: str, folder: Path, *, quantize: str, trust: bool, on_status: Status
) -> dict[str, Any]:
    choice = read_choice(source.folder) or TemplateChoice()
    template = load_template(
        source.tokenizer_folder,
        template="none" if choice.raw else None,
        kwargs=choice.template_kwargs,
        trust_remote_code=trust,
        dated=to == "gguf",
    )
    if to == "ollama":
        _report_family(template, on_status)
    model = load_causal_lm(source, dtype="float32", trust_remote_code=trust).model
    name = _file_name(folder.name, quantize)
    folder.mkdir()
    report = export_gguf(model, template, folder / name, quantize=quantize, name=folder.name)
    on_status(_words(report, quantize))
    if to == "ollama":
        write_modelfile(template, folder, name)
    if (source.folder / "README.md").is_file():
        shutil.copyfile(source.folder / "README.md", folder / "README.md")
    values = {key: getattr(report, key) for key in report.__slots__}
    return {"files": files_to_push(folder), "quantize": quantize, **values}


def _report_family(template: Template, on_status: Status) -> None:
    family = find_family(template)
    on_status(
        f"TEMPLATE: {family}, equal on every probe chat" if family else "TEMPLATE: plain text"
    )


def _file_name(name: str, quantize: str) -> str:
    return f"{name}-{quantize.upper()}.gguf"


def _words(report: GgufReport, quantize: str) -> str:
    text = f"{report.size:,} bytes, {quantize}; read back: mean KL {report.kl:.1e} nats from the "
    text += f"trained model on {report.tokens} probe tokens"
    if report.rounded is not None:
        text += f", logits {report.rounded:.1e} from the same weights rounded"
    return text
