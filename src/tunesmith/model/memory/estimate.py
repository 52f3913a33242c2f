"""Memory estimate of a training run from the config alone, and the free memory of the device.

Bytes of a trained parameter: its weight, a float32 gradient, the two float32 moments of AdamW, and
what completes a 16-bit weight to a float32 master (2 bytes for bfloat16). A frozen one: its weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tunesmith.errors import ModelError, first_line
from tunesmith.model.adapters import candidates
from tunesmith.model.adapters.kinds import BOFT_BLOCK, OFT_BLOCK
from tunesmith.model.architecture import empty_model
from tunesmith.model.causal_lm import CausalLM, outside_decoder
from tunesmith.model.lm_head import LogitTransform
from tunesmith.model.quantization.load import Quantization, quantizable
from tunesmith.model.source import ModelSource, refuse_foreign_code

_GIB = 2**30


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes that training holds all the time; activations come on top."""

    parameters: int  # count, the adapter's among them
    trained: int  # count
    weights: int
    gradients: int
    optimizer: int
    base: int = 0  # a frozen copy of the model, where an objective compares with it

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return self.weights + self.gradients + self.optimizer + self.base

    def __str__(self) -> str:
        parts = (
            ("weights", self.weights),
            ("gradients", self.gradients),
            ("optimizer", self.optimizer),
            ("frozen copy", self.base),
        )
        shown = ", ".join(f"{name} {show(size)}" for name, size in parts if size)
        return f"{show(self.total)} ({shown})"


@dataclass(frozen=True, slots=True)
class ModelSize:
    """Counts from the config alone. `per_rank`: parameters that one rank of an all-linear LoRA
    adds. Of the linear maps without experts: how many, and the widths of all their inputs and
    outputs.
    """

    parameters: int
    per_rank: int
    maps: int = 0
    inputs: int = 0
    outputs: int = 0
    quantizable: int = 0  # parameters that a quantised base keeps in fewer bits
    quantizable_rows: int = 0
    unread: int = 0  # parameters outside of the decoder, which text does not train


def measure(source: ModelSource, *, trust_remote_code: bool = False) -> ModelSize:
    """The model's size, from a model without storage.

    Raises:
        ModelError: the config can't be made into a causal language model.
    """
    config = read_config(source, trust_remote_code=trust_remote_code)
    try:
        model = empty_model(config, source.name, trust_remote_code=trust_remote_code)
    except ModelError:
        raise
    except Exception as error:  # a model class may fail at a configuration in any way
        raise ModelError(
            f"its config makes no causal language model: {first_line(error)}", where=source.name
        ) from error
    wrapped = CausalLM(model, logits=LogitTransform())
    found = candidates(wrapped)
    shapes = [_widths(model.get_submodule(name)) for name in found.linear]
    inputs, outputs = (sum(side) for side in zip(*shapes, strict=True)) if shapes else (0, 0)
    per_rank = inputs + outputs
    for name in found.experts:
        experts, rows, columns = model.get_parameter(name).shape
        per_rank += experts * (rows + columns)
    total = sum(p.numel() for p in model.parameters())
    outside = outside_decoder(wrapped)
    unread = sum(p.numel() for name, p in model.named_parameters() if name in outside)
    packed = [_widths(model.get_submodule(name)) for name in quantizable(wrapped)]
    return ModelSize(
        total,
        per_rank,
        maps=len(shapes),
        inputs=inputs,
        outputs=outputs,
        quantizable=sum(width * rows for width, rows in packed),
        quantizable_rows=sum(rows for _, rows in packed),
        unread=unread,
    )


def read_config(source: ModelSource, *, trust_remote_code: bool = False) -> Any:
    """The model's configuration, as transformers reads it.

    Raises:
        ModelError: foreign code without leave, or a config that can't be read.
    """
    from transformers import AutoConfig

    refuse_foreign_code(source, trusted=trust_remote_code)
    try:
        return AutoConfig.from_pretrained(source.folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # each config class checks its values with errors of its own
        reason = first_line(error)
        raise ModelError(f"its config can't be read: {reason}", where=source.name) from error


def adapter_parameters(
    size: ModelSize, kind: str, *, rank: int, rotation_size: int | None = None
) -> int:
    """Parameters of an adapter on all it can go on; loha, lokr, boft and ia3 about, others exactly.

    Ranks of single maps, chosen targets and the embedding are not looked at.
    """
    counts = {
        "dora": rank * (size.inputs + size.outputs) + size.outputs,
        "vera": rank * size.maps + size.outputs,
        "oft": size.inputs * ((rotation_size or OFT_BLOCK) - 1) // 2,
        "boft": size.inputs * (rotation_size or BOFT_BLOCK) + size.outputs,
        "ia3": size.outputs,
        "loha": 2 * rank * (size.inputs + size.outputs),
        "lokr": rank * (size.inputs + size.outputs),  # at most
        "hra": rank * size.inputs,
        "miss": rank * size.outputs,
    }
    return counts.get(kind, rank * size.per_rank)


def estimate(
    size: ModelSize,
    *,
    dtype: torch.dtype,
    rank: int | None,
    kind: str = "lora",
    rotation_size: int | None = None,
    quantization: Quantization | None = None,
    optimizer: str = "adamw",
    paged: bool = False,
    frozen_copy: bool = False,
) -> MemoryEstimate:
    """Bytes for training all parameters (`rank` None) or an all-linear adapter of this rank.

    `frozen_copy`: the objective compares with the model as it was. Full training keeps a copy of it
    for that; with an adapter the model itself is still there. `paged`: what the update rule keeps
    is elsewhere.
    """
    added = 0
    if rank is not None:
        added = adapter_parameters(size, kind, rank=rank, rotation_size=rotation_size)
    parameters = size.parameters + added
    trained = parameters - size.unread if rank is None else added
    rest = {torch.float32: 0, torch.bfloat16: 2}.get(dtype, 4)  # what completes a float32 master
    weights = parameters * dtype.itemsize
    if quantization is not None:
        weights -= size.quantizable * dtype.itemsize
        weights += quantization.bytes(size.quantizable, size.quantizable_rows, width=dtype.itemsize)
    state = _state_bytes(size, optimizer, trained, full=rank is None)
    return MemoryEstimate(
        parameters=parameters,
        trained=trained,
        weights=weights,
        gradients=4 * trained,
        optimizer=rest * trained + (0 if paged else state),
        base=weights if frozen_copy and rank is None else 0,
    )


def _state_bytes(size: ModelSize, optimizer: str, trained: int, *, full: bool) -> int:
    """Bytes of what the update rule keeps; of adafactor, about, none."""
    if optimizer == "muon":  # the maps' weights have one moment, embedding and head two
        return 8 * trained - 4 * (size.quantizable if full else trained)
    each = {"adamw_8bit": 2 + 2 * 4 / 256, "adafactor": 0, "lion": 4, "sgd": 4}
    return int(each.get(optimizer, 8) * trained)


def free_memory(device: torch.device | str) -> int:
    """Bytes that a new allocation may take; on a CPU what is available, less where a control group
    allows less.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "xpu":
        return torch.xpu.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    available = _available()
    limit = _group_limit(Path("/sys/fs/cgroup"))
    return available if limit is None else min(available, limit)


def check_fits(
    size: ModelSize,
    *,
    dtype: torch.dtype,
    rank: int | None,
    free: int,
    name: str,
    kind: str = "lora",
    rotation_size: int | None = None,
    quantization: Quantization | None = None,
    optimizer: str = "adamw",
    paged: bool = False,
    frozen_copy: bool = False,
) -> MemoryEstimate:
    """The estimate, if it leaves room.

    Raises:
        ModelError: more is needed than is free; with the numbers, and what would fit.
    """
    same: dict[str, Any] = {
        "kind": kind,
        "rotation_size": rotation_size,
        "quantization": quantization,
        "optimizer": optimizer,
        "paged": paged,
        "frozen_copy": frozen_copy,
    }
    needed = estimate(size, dtype=dtype, rank=rank, **same)
    if needed.total <= free:
        return needed
    options: list[tuple[str, MemoryEstimate]] = []
    lines = [] if dtype != torch.float32 else ["model.dtype=bfloat16"]
    if lines:
        options.append((lines[0], estimate(size, dtype=torch.bfloat16, rank=rank, **same)))
    if not paged:
        elsewhere = estimate(size, dtype=dtype, rank=rank, **{**same, "paged": True})
        options.append(("device.paged_optimizer=true", elsewhere))
    if frozen_copy and rank is None:
        plain = estimate(size, dtype=dtype, rank=None, **{**same, "frozen_copy": False})
        options.append(("objective.kl=0", plain))
    if rank is None:
        options.append(("adapter=lora", estimate(size, dtype=dtype, rank=16)))
        if lines:
            options.append(
                (f"adapter=lora {lines[0]}", estimate(size, dtype=torch.bfloat16, rank=16))
            )
    elif rank > 8 and kind not in ("oft", "boft", "ia3"):
        options.append(("adapter.rank=8", estimate(size, dtype=dtype, rank=8, **same)))
    fitting = [
        f"{line} needs {show(option.total)}" for line, option in options if option.total <= free
    ]
    hint = "; ".join(fitting) or "nothing fits here: take a smaller model or a larger device"
    raise ModelError(
        f"training {size.parameters / 1e6:,.0f}M parameters needs {needed}, free are {show(free)}",
        where=name,
        hint=hint,
    )


def _widths(module: Any) -> tuple[int, int]:
    """Widths of a linear map's input and output; GPT-2's maps keep them the other way round."""
    rows, columns = module.weight.shape
    return (columns, rows) if isinstance(module, torch.nn.Linear) else (rows, columns)


def _available() -> int:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        import os

        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    kilobytes = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    return 1024 * kilobytes


def _group_limit(root: Path) -> int | None:
    """What the control group of this process still allows; None without a limit. Version 2's files,
    then version 1's.
    """
    for limit_name, usage_name in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            limit = (root / limit_name).read_text(encoding="ascii").strip()
            usage = int((root / usage_name).read_text(encoding="ascii"))
        except (OSError, ValueError):
            continue
        if limit == "max" or int(limit) >= 2**60:
            return None
        # file cache counts as usage but is given back when memory is asked for
        return max(0, int(limit) - usage + _cache(root / limit_name))
    return None


def _cache(limit_file: Path) -> int:
    try:
        lines = (limit_file.parent / "memory.stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    fields = dict(line.split() for line in lines if len(line.split()) == 2)
    return int(fields.get("inactive_file", fields.get("total_inactive_file", 0)))


def show(size: int) -> str:
    """The size for people."""
    return f"{size / _GIB:.1f} GiB" if size >= _GIB else f"{size / 2**20:.0f} MiB"
