"""Generation: batched answers, or one streamed answer."""

from tunesmith.generate.batched import Generation, Options, answers, generate
from tunesmith.generate.prompts import Prompt, prompt_from, prompts_from_document
from tunesmith.generate.stream import stream

__all__ = [
    "Generation",
    "Options",
    "Prompt",
    "answers",
    "generate",
    "prompt_from",
    "prompts_from_document",
    "stream",
]
