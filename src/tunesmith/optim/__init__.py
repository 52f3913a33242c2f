"""Optimizers with float32-exact updates, and learning-rate schedules."""

from tunesmith.optim.adamw import AdamW, AdamW8bit
from tunesmith.optim.optimizer import Optimizer, clip_factor, grad_norm
from tunesmith.optim.paging import Pages
from tunesmith.optim.rules import SGD, Adafactor, Lion, Muon
from tunesmith.optim.schedules import auto_lr, schedule, warmup_steps
from tunesmith.optim.weight_decay import no_decay, undecayed

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
