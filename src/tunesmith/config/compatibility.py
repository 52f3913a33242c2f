"""The table of what does not go together: parallelism, FSDP2, QLoRA, torch.compile and float8.

Each row names the key to change, why it does not fit, and what to write instead. `check_together`
reports all misfits of a recipe at once. `checks.py` holds what is wrong within one section.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tunesmith.config.document import Problem
from tunesmith.config.read import recipe_error
from tunesmith.config.schema import Recipe

ELEMENTWISE = ("adamw", "lion", "sgd")
"""Optimizers that treat each element by itself, so that a shard is updated as the whole is."""
SHARDED_ADAPTERS = ("none", "lora")
SHARDED_BASES = ("none", "nf4", "fp4")
"""Quantised bases whose packed bytes FSDP2 can shard."""
LOW_RANK = ("none", "lora", "rslora")
"""Adapters that leave the product of the weight they are on as it is."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What the table needs to know besides the recipe."""

    world_size: int = 1
    local_size: int = 1  # ranks on this machine
    device: str = "cpu"
    with_adapter: bool | None = None  # the model's folder holds an adapter; None: not looked up yet
    in_memory: bool = False  # the caller passed a model object instead of a name


@dataclass(frozen=True, slots=True)
class Misfit:
    """A row of the table. `wrong` is asked only where `when` holds."""

    key: str
    when: Callable[[Recipe, Facts], bool]
    wrong: Callable[[Recipe, Facts], bool]
    message: Callable[[Recipe, Facts], str]
    hint: Callable[[Recipe, Facts], str]


def check_together(recipe: Recipe, facts: Facts) -> None:
    """Refuse a recipe whose parts do not go together, before anything is loaded.

    Raises:
        RecipeError: with every misfit, each with its key and what to write instead.
    """
    problems = [*_groups(recipe, facts)]
    problems += [
        Problem(row.key, row.message(recipe, facts), "", row.hint(recipe, facts))
        for row in TABLE
        if row.when(recipe, facts) and row.wrong(recipe, facts)
    ]
    if problems:
        raise recipe_error(problems)


def _groups(recipe: Recipe, facts: Facts) -> Iterator[Problem]:
    """Model-parallel groups must divide the world."""
    for key, count, what in (
        ("device.context_parallel", recipe.device.context_parallel, "share a sequence"),
        ("device.tensor_parallel", recipe.device.tensor_parallel, "divide the layers"),
    ):
        if count == 1:
            continue
        if facts.world_size == 1:
            hint = f"device.ranks={count} or a multiple of it, torchrun, or {key}=1"
            yield Problem(key, f"one process has nobody to {what} with", "", hint)
        elif facts.world_size % count:
            fitting = [n for n in range(1, count) if facts.world_size % n == 0]
            yield Problem(
                key, f"{facts.world_size} ranks can't be divided into groups of {count}", "",
                f"{key}={fitting[-1]}, or a multiple of {count} ranks",
            )  # fmt: skip


def _always(recipe: Recipe, facts: Facts) -> bool:
    return True


def _context(recipe: Recipe, facts: Facts) -> bool:
    return recipe.device.context_parallel > 1


def _tensor(recipe: Recipe, facts: Facts) -> bool:
    return recipe.device.tensor_parallel > 1


def _shard(recipe: Recipe, facts: Facts) -> bool:
    return recipe.device.shard != "none"


def _compiled(recipe: Recipe, facts: Facts) -> bool:
    return recipe.device.compile != "none"


def _float8(recipe: Recipe, facts: Facts) -> bool:
    return recipe.model.float8 != "none"


def _context_row(key: str, wrong: Callable[[Recipe], bool], why: str) -> Misfit:
    return Misfit(
        key, _context, lambda r, _: wrong(r),
        lambda r, _: f"this {why}, and device.context_parallel={r.device.context_parallel} gives "
        "each rank a slice",
        lambda r, _: f"leave {key} at its default, or device.context_parallel=1",
    )  # fmt: skip


def _tensor_row(key: str, wrong: Callable[[Recipe], bool], instead: str, why: str) -> Misfit:
    return Misfit(
        key, _tensor, lambda r, _: wrong(r),
        lambda r, _: f"this {why}, and device.tensor_parallel={r.device.tensor_parallel} gives "
        "each rank a part of every layer",
        lambda r, _: f"{key}={instead}, or device.tensor_parallel=1",
    )  # fmt: skip


def _shard_row(
    key: str, value: Callable[[Recipe], str], taken: tuple[str, ...], why: str
) -> Misfit:
    return Misfit(
        key, _shard, lambda r, _: value(r) not in taken,
        lambda r, _: f"{value(r)} {why}, and device.shard={r.device.shard} gives each rank a part",
        lambda r, _: f"{key}={taken[0]}, or device.shard=none",
    )  # fmt: skip


def _compile_row(key: str, wrong: Callable[[Recipe], bool], instead: str, why: str) -> Misfit:
    return Misfit(
        key, _compiled, lambda r, _: wrong(r),
        lambda r, _: f"this {why}, which device.compile={r.device.compile} does not go with",
        lambda r, _: f"{key}={instead}, or device.compile=none",
    )  # fmt: skip


def _float8_row(key: str, wrong: Callable[[Recipe, Facts], bool], instead: str, why: str) -> Misfit:
    return Misfit(
        key, _float8, wrong,
        lambda r, _: f"does not go with products in float8: {why}",
        lambda r, _: f"{key}={instead}, or model.float8=none",
    )  # fmt: skip


def _no_hybrid(recipe: Recipe, facts: Facts) -> bool:
    nodes, rest = divmod(facts.world_size, facts.local_size)
    return recipe.device.shard == "hybrid" and (nodes < 2 or bool(rest) or facts.local_size < 2)


def _untrainable(recipe: Recipe, facts: Facts) -> bool:
    """Whether weights that are kept in few bits would have to be trained themselves."""
    adapter = recipe.adapter
    if adapter.kind != "none":
        return False
    if adapter.parameters is not None or adapter.top_layers is not None:
        return True
    return adapter.continue_from is None and facts.with_adapter is False


TABLE: tuple[Misfit, ...] = (
    # Context parallelism: each rank holds a shard of the sequence.
    _context_row("device.attention", lambda r: r.device.attention == "unpacked",
                 "takes whole paths"),
    _context_row("objective.router_aux", lambda r: r.objective.router_aux > 0,
                 "looks at all tokens of a path at once"),
    _context_row("objective.scheduled_sampling", lambda r: r.objective.scheduled_sampling > 0,
                 "writes guesses over tokens that another rank may have"),
    # Tensor parallelism: each rank holds a shard of every linear.
    _tensor_row("device.context_parallel", lambda r: r.device.context_parallel > 1, "1",
                "deals sequences to the same ranks"),
    _tensor_row("device.shard", lambda r: r.device.shard != "none", "none",
                "divides the same weights"),
    _tensor_row("adapter.kind", lambda r: r.adapter.kind not in LOW_RANK, "lora",
                "needs whole weights"),
    _tensor_row("model.quantization", lambda r: r.model.quantization != "none", "none",
                "packs whole weights"),
    _tensor_row("optim.name", lambda r: r.optim.name not in ELEMENTWISE, ELEMENTWISE[0],
                "looks at whole weights"),
    _tensor_row("device.attention", lambda r: r.device.attention == "unpacked", "auto",
                "is not divided"),
    _tensor_row("objective.scheduled_sampling", lambda r: r.objective.scheduled_sampling > 0, "0",
                "needs the guesses at all targets, of which each rank has a share"),
    _tensor_row("eval.samples", lambda r: r.eval.samples > 0, "0",
                "needs a whole model on one rank"),
    # FSDP2: each rank holds a shard of every weight.
    Misfit(
        "device.shard_offload", _always,
        lambda r, f: r.device.shard_offload and r.device.shard == "none",
        lambda r, f: "only shards are kept in the host's memory",
        lambda r, f: "add device.shard=full, or take it away",
    ),
    Misfit(
        "device.shard", _always, lambda r, f: r.device.shard != "none" and f.world_size == 1,
        lambda r, f: "one process has nobody to share the model with",
        lambda r, f: "device.ranks=2 or more, torchrun, or device.shard=none",
    ),
    Misfit(
        "device.shard", lambda r, f: f.world_size > 1, _no_hybrid,
        lambda r, f: "hybrid spreads over the ranks of a machine and copies across machines, and "
        f"these {f.world_size} ranks are {f.local_size} a machine",
        lambda r, f: "device.shard=full",
    ),
    _shard_row("optim.name", lambda r: r.optim.name, ELEMENTWISE, "looks at whole weights"),
    _shard_row("adapter.kind", lambda r: r.adapter.kind, SHARDED_ADAPTERS,
               "needs whole weights of its base"),
    _shard_row("model.quantization", lambda r: r.model.quantization, SHARDED_BASES,
               "can't be taken apart"),
    Misfit(
        "device.shard_offload", _shard, lambda r, f: r.device.shard_offload and f.device == "cpu",
        lambda r, f: "on a CPU shards are in the host's memory already",
        lambda r, f: "device.shard_offload=false",
    ),
    Misfit(
        "eval.samples", _shard, lambda r, f: r.eval.samples > 0,
        lambda r, f: "answers can't be generated while the model is spread by "
        f"device.shard={r.device.shard}",
        lambda r, f: "eval.samples=0; `tunesmith generate RUN` answers afterwards",
    ),
    # A quantised base (QLoRA): only an adapter on it is trained.
    Misfit(
        "model.quantization", lambda r, f: r.model.quantization != "none", _untrainable,
        lambda r, f: f"weights kept as {r.model.quantization} can't be trained, only an adapter on "
        "them",
        lambda r, f: "add adapter=lora, or model.quantization=none",
    ),
    Misfit(
        "model.quantization", lambda r, f: r.model.quantization != "none",
        lambda r, f: f.in_memory,
        lambda r, f: f"{r.model.quantization} is made while a model is read, and this one was "
        "given in memory",
        lambda r, f: "name the model's folder, or model.quantization=none",
    ),
    # Regional torch.compile of the decoder's layers.
    _compile_row("device.kernels", lambda r: r.device.kernels == "liger", "auto",
                 "replaces what the compiler makes kernels of itself"),
    _compile_row("device.gradient_checkpointing",
                 lambda r: r.device.gradient_checkpointing == "selective", "layers",
                 "keeps results of operations that a compiled layer no longer has"),
    _compile_row("device.shard", lambda r: r.device.shard != "none", "none",
                 "gives each rank a part of the weights"),
    _compile_row("device.tensor_parallel", lambda r: r.device.tensor_parallel > 1, "1",
                 "sends messages inside of a layer"),
    _compile_row("device.activation_offload", lambda r: r.device.activation_offload, "false",
                 "moves what operations keep"),
    _compile_row("model.float8", lambda r: r.model.float8 != "none", "none",
                 "rounds inside of a product"),
    _compile_row("model.quantization", lambda r: r.model.quantization != "none", "none",
                 "multiplies by kernels that are no operations of torch"),
    # float8 products, rowwise scaled.
    _float8_row("model.quantization", lambda r, f: r.model.quantization != "none", "none",
                "a quantised base is multiplied as plain weights"),
    _float8_row("adapter.kind", lambda r, f: r.adapter.kind not in LOW_RANK, "lora",
                "this kind changes the weight itself"),
    _float8_row("adapter.continue_from",
                lambda r, f: r.adapter.continue_from is not None or f.with_adapter is True,
                "null",
                "this model comes with an adapter"),
    _float8_row("objective.name", lambda r, f: r.objective.name in ("psft", "asft"), "dft",
                "what it compares with is computed without them"),
    _float8_row("objective.kl", lambda r, f: bool(r.objective.kl), "null",
                "the base is computed without them"),
    _float8_row("device.shard", lambda r, f: r.device.shard != "none", "none",
                "parts of weights have other rows"),
    _float8_row("device.tensor_parallel", lambda r, f: r.device.tensor_parallel > 1, "1",
                "parts of weights have other rows"),
    _float8_row("device.context_parallel", lambda r, f: r.device.context_parallel > 1, "1",
                "that has not been shown"),
)  # fmt: skip
