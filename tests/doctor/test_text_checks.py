"""Damage to letters, loops, echoes and marks: what is found, and what honest text looks like."""

from __future__ import annotations

import pytest
from planted import WORDS

from tiny import tiny_tokenizer
from tunesmith.data.formats.examples import Chat, Message
from tunesmith.data.row_errors import Fault
from tunesmith.data.templates.load import wrap_tokenizer
from tunesmith.doctor.catalogue import run_check
from tunesmith.doctor.corpus import Case, Corpus, Setup
from tunesmith.doctor.minhash import plain, words_of
from tunesmith.types import Origin

HONEST = [
    "Crème brûlée à la carte, où êtes-vous? Ça va: «très bien».",
    "Grüße aus Köln, Straße für Straße; naïve façade, œuvre.",
    "São Paulo, coração, avô, não; ¿Qué tal? ¡Olé! Año, Málaga.",
    "Čeština: příliš žluťoučký kůň; Türkçe: ığüşöç İstanbul; Việt Nam: tiếng Việt.",
    "Привет, как дела? Καλημέρα κόσμε. שלום עולם. مرحبا بالعالم. नमस्ते दुनिया।",
    "日本語の文章です。中文句子。한국어 문장입니다. ไทย",
    "“Curly quotes”, ‘single’, dashes – and —, ellipsis…, euro €, bullet •, ½, ×, ²",
    "Emoji 😀 👩‍👩‍👧 🇳🇴 and arrows → ⇒, maths ∑∫√ ≤ ≥ ±, box ┌─┐│",
    "Tabs\tand\nnewlines\r\nare fine; so is a non-breaking\u00a0space and soft\u00adhyphen.",
    "Zero\u200bwidth and \u200e marks of direction",
    "“Touché…” he said: “‘cliché’”—naïve… Spaß“ groß» MAÇÃ” LIBERTÉ\u00a0: «\u00a0été\u00a0»",
    "Pokémon™, Nescafé®, É° Ä“ Ü” Å»",
    "It cost 5 £ £5 §3 ©2020 ® ™ Å Ø Æ Ü",
]


def case_of(answer: str, question: str = "What is there to say about it?", row: int = 0) -> Case:
    """A row that was not rendered; what it says is looked at all the same."""
    chat = Chat((Message("user", question), Message("assistant", answer)))
    return Case(Origin("f", row), chat, fault=Fault("new-kind", "not rendered"))


def found(check: str, *answers: str, question: str = "What is there to say about it?") -> list[str]:
    cases = [case_of(answer, question, row) for row, answer in enumerate(answers)]
    setup = Setup(wrap_tokenizer(tiny_tokenizer()))
    return [hit.text for hit in run_check(check, Corpus(cases), setup).examples]


@pytest.mark.parametrize("text", HONEST)
@pytest.mark.parametrize("check", ["encoding", "html-entities", "loops", "turn-markers"])
def test_honest_text_passes(check: str, text: str) -> None:
    assert found(check, text) == []


@pytest.mark.parametrize("text", HONEST)
@pytest.mark.parametrize("code", ["cp1252", "latin-1"])
def test_utf8_read_as_one_byte_a_character_is_found(text: str, code: str) -> None:
    damaged = text.encode().decode(code, errors="ignore" if code == "cp1252" else "strict")
    assert damaged != text
    assert len(found("encoding", damaged)) == 1


def test_the_meant_character_is_shown() -> None:
    assert found("encoding", "a cafÃ©") == [
        "message 1 (assistant): 'Ã©' stands for 'é' in 'a cafÃ©'"
    ]


@pytest.mark.parametrize("text", ["“cafÃ©”", "“Itâ€™s”", "naÃ¯ve…", "Â\u00a0x", "Ä\u008desky"])
def test_misread_letters_among_honest_quotes(text: str) -> None:
    assert len(found("encoding", f"He said: {text}")) == 1


@pytest.mark.parametrize("char", ["\ufffd", "\x00", "\x08", "\x1b", "\x7f", "\x9b"])
def test_replaced_and_control_characters(char: str) -> None:
    (text,) = found("encoding", f"one{char}two")
    assert f"U+{ord(char):04X}" in text


def test_entities_in_plain_text_only() -> None:
    assert len(found("html-entities", "Tom &amp; Jerry", "a &#39;b&#39;", "x &nbsp; y")) == 3
    assert (
        found("html-entities", "Write `&amp;` in HTML", "<b>Tom &amp; Jerry</b>", "AT&T; R&D") == []
    )


LOOPS = [
    "yes " * 20,
    "I am sorry. " * 7,
    f"It begins well. {'and then it goes on in the same way ' * 4}",
    "はい" * 30,
    "!" * 70,
    (" ".join(WORDS[:50]) + " ") * 4,
]
NO_LOOPS = [
    "yes " * 19,
    " ".join(WORDS),
    "row row row your boat gently down the stream, merrily merrily merrily merrily",
    "| a | b |\n|---|---|\n" + "\n".join(f"| {n} | {n * n} |" for n in range(30)),
    "=" * 100,
    "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22",
    "the cat and the dog and the cow and the hen and the pig and the fox and the owl",
    "",
]


@pytest.mark.parametrize("text", LOOPS)
def test_loops_are_found(text: str) -> None:
    assert len(found("loops", "A fine answer.", text, "Another one.")) == 1


@pytest.mark.parametrize("text", NO_LOOPS)
def test_lists_songs_and_tables_are_no_loops(text: str) -> None:
    assert found("loops", text) == []


def test_a_loop_does_not_reach_into_the_next_answer() -> None:
    assert found("loops", *["yes " * 12] * 4) == []


def test_echo_is_the_whole_question() -> None:
    question = "How many sacks of flour does the baker need for all these loaves?"
    echo = question.upper() + " He needs four."
    assert len(found("prompt-echo", echo, "The baker needs four.", question=question)) == 1
    assert found("prompt-echo", "How many sacks? Four.", question=question) == []
    assert found("prompt-echo", "Why not? Because.", question="Why not?") == []


@pytest.mark.parametrize(
    "answer",
    [
        "Fine.\nUser: And now?\nAssistant: Still fine.",
        "Fine.\n### Instruction:\nGo on.",
        "Fine.</s>[INST] And now? [/INST]",
        "Fine.<|im_end|>",
        "<start_of_turn>model\nFine.",
    ],
)
def test_turns_inside_an_answer(answer: str) -> None:
    assert len(found("turn-markers", answer)) == 1


@pytest.mark.parametrize(
    "answer",
    [
        "The tag `[INST]` opens a turn.",
        "```\nUser: hello\nAssistant: hi\n```",
        "User: someone who uses the program.",
        "The user: a person. The assistant: a program.",
        "## Response times",
    ],
)
def test_talk_about_turns_passes(answer: str) -> None:
    assert found("turn-markers", answer) == []


@pytest.mark.parametrize(
    "answer",
    [
        "This is the way in which one goes to the",
        "There are three of them: the first, the second,",
        "Write it so:\n```python\nprint(1)\n",
        '[1, 2, {"a": "b"',
        '{"a": 1, "b":',
    ],
)
def test_answers_that_break_off(answer: str) -> None:
    assert len(found("cut-off-answers", answer)) == 1


@pytest.mark.parametrize(
    "answer",
    [
        "the",
        "one, two,",
        "This is the way in which it is done now",
        "Write it so:\n```python\nprint(1)\n```",
        '{"a": [1, 2]}',
        "[1] is the first reference of a list of them",
        "{not json} at all, but a sentence of its own here",
        "#### 72",
        "The simplest way is this:\n```cout << string```",
    ],
)
def test_answers_that_end(answer: str) -> None:
    assert found("cut-off-answers", answer) == []


def test_words_and_plain_text() -> None:
    assert words_of("It's 3.5 km, snake_case!") == ["it", "s", "3", "5", "km", "snake", "case"]
    assert words_of("日本 abc カナ") == ["日", "本", "abc", "カ", "ナ"]
    assert plain("  Ａ\u00a0b\n\nC ") == "a b c"
