"""The optimizer and the learning rate of each step."""

from tunesmith.optim.adamw import AdamW
from tunesmith.optim.decay import no_decay, undecayed
from tunesmith.optim.norm import clip_factor, grad_norm
from tunesmith.optim.schedules import auto_lr, schedule, warmup_steps

__all__ = [
    "AdamW",
    "auto_lr",
    "clip_factor",
    "grad_norm",
    "no_decay",
    "schedule",
    "undecayed",
    "warmup_steps",
]
