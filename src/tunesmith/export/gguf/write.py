"""GGUF writer: to a temporary file, checked, then renamed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tunesmith.data.templates.template import Template
from tunesmith.errors import ModelError, RunError
from tunesmith.export.gguf.check import GgufReport, check_file, probe_texts
from tunesmith.export.gguf.header import Header, read_header
from tunesmith.export.gguf.tensors import named_tensors
from tunesmith.export.gguf.tokens import Vocabulary, read_vocabulary
from tunesmith.model.causal_lm import CausalLM

QUANTIZATIONS = ("f16", "bf16", "q8_0")
_BLOCK = 32  # weights that share one scale


def export_gguf(
    model: CausalLM, template: Template, path: Path, *, quantize: str = "f16", name: str = "model"
) -> GgufReport:
    """Write the model, loaded in float32 and without an adapter, to `path`.

    The model's weights are rounded afterwards: what is checked is computed with them.

    Raises:
        ModelError: a family, tokenizer or setting that can't be written, or a file that would
            compute something else; it is removed.
        RunError: the file can't be written.
    """
    base = model.base
    header = read_header(base.config)
    vocabulary = read_vocabulary(template, base.get_input_embeddings().weight.shape[0])
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.writing")
    try:
        _write(temporary, base, header, _Words(template, vocabulary, name), quantize=quantize)
        with model.generation() as plain:
            report = check_file(
                temporary, plain, template, quantize=quantize, texts=probe_texts(template)
            )
        temporary.rename(path)
    except OSError as error:
        raise RunError(f"can't be written: {error}", where=str(path)) from error
    except ModelError as error:
        raise ModelError(error.message, where=str(path), hint=error.hint) from error
    finally:
        temporary.unlink(missing_ok=True)
    return report


class _Words:
    """What the header says of text."""

    def __init__(self, template: Template, vocabulary: Vocabulary, name: str) -> None:
        self.template, self.vocabulary, self.name = template, vocabulary, name


def _write(path: Path, base: Any, header: Header, words: _Words, *, quantize: str) -> None:
    try:
        from gguf import GGUFWriter, LlamaFileType
    except ImportError as error:
        raise ModelError(
            "writing .gguf files needs the package gguf", hint="pip install 'tunesmith[gguf]'"
        ) from error
    writer = GGUFWriter(path, header.architecture)
    writer.add_name(words.name)
    for key, value in header.fields.items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add[type(value)](f"{header.architecture}.{key}", value)  # pyright: ignore
    kinds = {"f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
    writer.add_file_type(LlamaFileType[kinds[quantize]])
    writer.add_quantization_version(2)
    _add_vocabulary(writer, words.vocabulary)
    _add_ends(writer, words.template)
    if header.rope_factors is not None:
        writer.add_tensor("rope_freqs.weight", header.rope_factors)
    tied = bool(base.config.get_text_config().tie_word_embeddings)
    for name, tensor in named_tensors(base.state_dict(), header, tied=tied):
        _add_tensor(writer, name, tensor.contiguous().numpy(), quantize=quantize)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.model == "gpt2":
        writer.add_token_merges(vocabulary.merges)
    else:
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(vocabulary.space_prefix)


def _add_ends(writer: Any, template: Template) -> None:
    tokenizer = template.tokenizer
    if template.bos_id is not None:
        writer.add_bos_token_id(template.bos_id)
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)
    if tokenizer.unk_token_id is not None:
        writer.add_unk_token_id(tokenizer.unk_token_id)
    ends = stop_order(template)
    for number, add in zip(
        ends, (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id),
        strict=False,
    ):  # fmt: skip
        add(number)
    writer.add_add_bos_token(begins_with_bos(template))
    writer.add_add_eos_token(False)
    if template.has_chat_template:
        text = template.jinja or tokenizer.chat_template
        if isinstance(text, str):
            writer.add_chat_template(text)


def stop_order(template: Template) -> Sequence[int]:
    """The stop ids, the tokenizer's own end of text first."""
    return sorted(template.stop_ids, key=lambda number: (number != template.eos_id, number))


def begins_with_bos(template: Template) -> bool:
    """True if what the model was trained on begins with the BOS token.

    A token that opens every turn, as `<|im_start|>` may be, is none even where it has the name.
    """
    bos = template.bos_id
    if bos is None:
        return False
    added = template.encode(["a"], add_special_tokens=True)[0][:1] == [bos]
    if not template.has_chat_template:
        return added
    question = {"role": "user", "content": "a"}
    chat = [question, {"role": "assistant", "content": "b"}, question]
    ids = template.encode([template.render(chat)])[0]
    return ids[:1] == [bos] and (added or ids.count(bos) == 1)


def _add_tensor(writer: Any, name: str, data: np.ndarray, *, quantize: str) -> None:
    from gguf import GGMLQuantizationType, quantize as rounded  # noqa: I001

    if data.ndim == 1:
        writer.add_tensor(name, data.astype(np.float32))
        return
    kind = quantize
    if kind == "q8_0" and data.shape[-1] % _BLOCK:
        kind = "f16"
    if kind == "f16":
        with np.errstate(over="ignore"):
            half = data.astype(np.float16)
        if not np.isfinite(half).all():
            raise ModelError(f"{name} has weights above what f16 can hold", hint="--quantize bf16")
        writer.add_tensor(name, half)
        return
    number = GGMLQuantizationType[kind.upper()]
    writer.add_tensor(name, rounded(data.astype(np.float32), number), raw_dtype=number)
