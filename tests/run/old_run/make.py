"""Writes this folder with a checkout of the tree before recipe keys were renamed (commit a70ee0c).

    PYTHONPATH=CHECKOUT/src:CHECKOUT/tests python tests/run/old_run/make.py tests/run/old_run

It holds a tiny random model, rows, a run of six steps that was stopped after its checkpoint of step
3, and the losses of the same run when it was not stopped.
"""

from __future__ import annotations

import json
import shutil
import sys
from contextlib import suppress
from pathlib import Path

import tunesmith
from tiny import chat_rows, tiny_folder, write_jsonl
from tunesmith.train.trainer import Trainer

folder = Path(sys.argv[1])
sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
tiny_folder(folder / "model", **sizes)
write_jsonl(folder / "rows.jsonl", chat_rows(8))
OPTIONS = dict(
    model={"name": str(folder / "model"), "dtype": "float32"},
    data=str(folder / "rows.jsonl"),
    batch={"documents": 4},
    optim={"lr": 0.01},
    train={"steps": 6},
    checkpoint={"every": "3 steps", "keep": 1},
    device={"kind": "cpu", "attention": "isolated", "prepare_processes": 1, "threads": 1},
)
whole = tunesmith.train(out=folder / "whole", **OPTIONS)
records = (json.loads(line) for line in (folder / "whole/metrics.jsonl").read_text().splitlines())
losses = [record["loss"] for record in records if record["kind"] == "train"]
(folder / "losses.json").write_text(json.dumps(losses) + "\n")
shutil.rmtree(folder / "whole")

advance = Trainer._one_step


def stopped(self: Trainer) -> None:
    if self.step == 3:
        self._settle()
        raise KeyboardInterrupt
    advance(self)


Trainer._one_step = stopped
with suppress(KeyboardInterrupt):
    tunesmith.train(out=folder / "run", **OPTIONS)
