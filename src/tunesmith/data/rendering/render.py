"""The renderer: an example becomes a document with exactly the ids that inference sees, and its
loss mask.

For each answer the prompt is what the chat template renders with `add_generation_prompt=True`, and
the target is the rest of the rendered conversation up to the stop token. Prompt and target are
tokenized apart, as a server does.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence

import numpy as np

from tunesmith.data.formats.examples import (
    Chat,
    Completion,
    Example,
    Parts,
    TemplatedText,
    Text,
    Tokens,
)
from tunesmith.data.rendering.content_checks import (
    check_contents,
    check_special_tokens,
    refuse_special_tokens,
)
from tunesmith.data.rendering.pretokenized import render_parts, render_tokens
from tunesmith.data.rendering.result import NO_TARGETS, Limit, Rendered, Rendering
from tunesmith.data.rendering.templated import render_templated
from tunesmith.data.rendering.token_paths import TokenPath, fit_paths, fit_stream
from tunesmith.data.rendering.tokenize import Wanted
from tunesmith.data.rendering.turns import Turn, read_turns, render_all
from tunesmith.data.row_errors import Fault, RowError
from tunesmith.data.templates.template import Template
from tunesmith.types import IntArray, Origin

_SHOWN = 40  # characters


def render_example(
    example: Example,
    template: Template,
    *,
    train_on: str | list[str] = "auto",
    max_length: int | None = None,
    too_long: str = "error",
    origin: Origin,
) -> Rendered:
    """Render one example to a document, as `render_steps` describes it.

    Raises:
        RowError: the example can't be learned as inference would see it.
    """
    steps = render_steps(
        example,
        template,
        train_on=train_on,
        max_length=max_length,
        too_long=too_long,
        origin=origin,
    )
    try:
        wanted = next(steps)
        while True:
            wanted = steps.send([_encode(one, template) for one in wanted])
    except StopIteration as finished:
        return finished.value


def render_steps(
    example: Example,
    template: Template,
    *,
    train_on: str | list[str] = "auto",
    max_length: int | None = None,
    too_long: str = "error",
    origin: Origin,
) -> Rendering:
    """Render one example; the generator yields texts and receives their ids, so rows can share a
    call.

    `max_length` bounds the longest path of the document. `too_long` decides what happens to a
    longer row: `error` refuses it, `drop` leaves it out, `truncate` cuts a text, and of a chat or
    completion leaves out every answer that does not fit with its stop token. `split` cuts a text or
    raw completion into pieces, each with its own root; a chat is treated as with `truncate`, since
    its answers need their prompts.

    Raises:
        RowError: the example can't be learned as inference would see it.
    """
    limit = (max_length, too_long)
    if isinstance(example, Chat):
        if train_on == "all":
            ids = yield from _conversation_ids(example, template)
            return fit_stream(ids, 1, limit, origin)
        return (yield from _chat(example, template, train_on, limit, origin))
    if isinstance(example, Completion):
        everything = train_on == "all"
        ids, first = yield from _completion_ids(example, template, everything=everything)
        return fit_stream(ids, first, limit, origin, whole=not everything)
    if isinstance(example, Text):
        ids = yield from _text_ids(example, template)
        return fit_stream(ids, 1, limit, origin)
    return (yield from _pretokenized(example, template, train_on, limit, origin))


def _pretokenized(
    example: Parts | TemplatedText | Tokens,
    template: Template,
    train_on: str | list[str],
    limit: Limit,
    origin: Origin,
) -> Rendering:
    """Render a row with its own control tokens or its own ids."""
    if isinstance(example, Tokens):
        return render_tokens(example, template, train_on, limit, origin)
    if isinstance(example, Parts):
        return (yield from render_parts(example, template, train_on, limit, origin))
    return (yield from render_templated(example, template, train_on, limit, origin))


def _encode(wanted: Wanted, template: Template) -> IntArray:
    text, special = wanted
    return np.array(template.encode([text], add_special_tokens=special)[0], np.int32)


_Ids = Generator[Sequence[Wanted], Sequence[IntArray], IntArray]


def _chat(
    chat: Chat, template: Template, train_on: str | list[str], limit: Limit, origin: Origin
) -> Rendering:
    turns = read_turns(chat, template, train_on=train_on)
    if not turns:
        ids = yield [(render_all(chat, template), False)]
        return Rendered(None, "dropped", NO_TARGETS, len(ids[0]), 0)
    last = turns[-1].message + 1
    texts = [text for turn in turns for text in (turn.prompt, turn.target)]
    tail = last < len(chat.messages)
    if tail:
        texts += [render_all(chat, template), render_all(chat, template, last)]
    ids = yield [(text, False) for text in texts]
    unused = max(0, len(ids[-2]) - len(ids[-1])) if tail else 0
    paths = [
        path
        for number, turn in enumerate(turns)
        if (path := _path(turn, ids[2 * number], ids[2 * number + 1], template)) is not None
    ]
    return fit_paths(paths, limit, origin, unused)


def _path(turn: Turn, prompt: IntArray, target: IntArray, template: Template) -> TokenPath | None:
    """The token path of a turn, cut after its stop token."""
    stop = _first_stop(target, template)
    if stop is not None:
        _check_tail(turn, target[stop + 1 :].tolist(), template)
        target = target[: stop + 1]
    elif turn.answer:
        raise _no_stop(turn, target, template)
    ids = np.concatenate([prompt, target])
    first = max(len(prompt), 1)  # the first token has no token before it
    return TokenPath(ids, first, len(ids), turn.weight, turn.message) if first < len(ids) else None


def _first_stop(ids: IntArray, template: Template) -> int | None:
    found = [places[0] for s in template.stop_ids if len(places := np.flatnonzero(ids == s))]
    return int(min(found)) if found else None


def _check_tail(turn: Turn, tail: list[int], template: Template) -> None:
    if tail and tail[0] in template.special_ids and turn.prompt.endswith(template.decode(tail)):
        return  # the next generation prompt, which this template always writes
    words = [token for token in tail if token not in template.special_ids]
    left = template.decode(words).strip()
    if left:
        raise RowError(
            Fault(
                "text-after-stop",
                f"message {turn.message} goes on after its stop token, with {left[:60]!r}",
                "at inference the model would stop there; use another template",
            )
        )


def _no_stop(turn: Turn, target: IntArray, template: Template) -> RowError:
    stops = ", ".join(template.token_text(token) for token in sorted(template.stop_ids))
    end = template.decode(target)[-_SHOWN:]
    return RowError(
        Fault(
            "no-stop-token",
            f"message {turn.message} ends with {end!r} without a stop token ({stops or 'none'}), "
            "so the model would never learn to stop",
            "the template must close an answer with a token that the tokenizer or "
            "generation_config.json names as eos",
        )
    )


def _conversation_ids(chat: Chat, template: Template) -> _Ids:
    """The ids of the whole conversation, without what follows its last stop token."""
    wishes = [n for n, m in enumerate(chat.messages) if m.train is not None or m.weight is not None]
    if wishes:
        raise RowError(
            Fault(
                "conflicting-wishes",
                f"message {wishes[0]} has its own train or weight, but train_on is all",
                "give data.train_on=assistant, or take these fields out",
            )
        )
    check_special_tokens(chat, template)
    text = render_all(chat, template)
    check_contents(text, chat, len(chat.messages) - 1)
    (ids,) = yield [(text, False)]
    stops = np.flatnonzero(np.isin(ids, list(template.stop_ids)))
    if len(stops) and not template.decode(ids[stops[-1] + 1 :]).strip():
        return ids[: stops[-1] + 1]
    return ids


def _text_ids(example: Text, template: Template) -> _Ids:
    _check_raw(
        example.text,
        template,
        "the text",
        bos=True,
        eos=True,
        hint="a chat that a template has written already is data.train=[{path: ..., "
        "format: templated_text}]; in any other text take it out",
    )
    (ids,) = yield [(example.text, True)]
    return _closed(ids, template)


def _completion_ids(
    example: Completion, template: Template, *, everything: bool
) -> Generator[Sequence[Wanted], Sequence[IntArray], tuple[IntArray, int]]:
    """Prompt and completion as inference concatenates them, and the place of the first target."""
    _check_raw(example.prompt, template, "the prompt", bos=True)
    _check_raw(example.completion, template, "the completion", eos=True)
    prompt, completion = yield [(example.prompt, True), (example.completion, False)]
    if not example.prompt:
        # The tokenizer may put BOS before an empty prompt.
        prompt = prompt[: int(len(prompt) > 0 and prompt[0] == template.bos_id)]
    while len(prompt) > 1 and prompt[-1] in template.stop_ids:
        prompt = prompt[:-1]
    ids = np.concatenate([prompt, _closed(completion, template)])
    return ids, 1 if everything else max(len(prompt), 1)


def _closed(ids: IntArray, template: Template) -> IntArray:
    """The ids with the EOS token at the end, once."""
    if template.eos_id is None:
        raise RowError(
            Fault(
                "no-stop-token",
                "the tokenizer has no eos token, so the model would never learn to stop",
                "set eos_token in the model's tokenizer_config.json",
            )
        )
    if len(ids) and ids[-1] in template.stop_ids:
        return ids
    return np.append(ids, np.int32(template.eos_id))


def _check_raw(
    text: str,
    template: Template,
    place: str,
    *,
    bos: bool = False,
    eos: bool = False,
    hint: str | None = None,
) -> None:
    """Refuse control tokens in raw text, except for BOS at its beginning and EOS at its end."""
    if bos and template.bos_id is not None:
        text = text.removeprefix(template.token_text(template.bos_id))
    if eos and template.eos_id is not None:
        text = text.removesuffix(template.token_text(template.eos_id))
    refuse_special_tokens(text, template, place, hint=hint)
