"""The optimizer and the learning rate of each step."""

from tunesmith.optim.adamw import AdamW, AdamW8bit
from tunesmith.optim.base import Optimizer
from tunesmith.optim.decay import no_decay, undecayed
from tunesmith.optim.norm import clip_factor, grad_norm
from tunesmith.optim.paging import Pages
from tunesmith.optim.rules import SGD, Adafactor, Lion, Muon
from tunesmith.optim.schedules import auto_lr, schedule, warmup_steps

__all__ = [
    "SGD",
    "Adafactor",
    "AdamW",
    "AdamW8bit",
    "Lion",
    "Muon",
    "Optimizer",
    "Pages",
    "auto_lr",
    "clip_factor",
    "grad_norm",
    "no_decay",
    "schedule",
    "undecayed",
    "warmup_steps",
]
