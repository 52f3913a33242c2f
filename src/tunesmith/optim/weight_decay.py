"""Weight decay groups: matrices are decayed; norms, biases and embeddings are not."""

from __future__ import annotations

from torch import Tensor, nn

_FACTORS = (".ia3_l.", ".boft_s.")
"""Scale factors of adapters, stored as matrices of one column; their neutral value is 1, not 0."""


def no_decay(name: str, parameter: Tensor, module: nn.Module | None = None) -> bool:
    """True for norms, biases, embeddings and all else that is not a matrix or a stack of matrices.

    Args:
        name: full name of the parameter; a bias of stacked experts is a matrix, known by its name.
        parameter: the parameter itself.
        module: the module that owns the parameter, if known.
    """
    if parameter.ndim < 2 or name.endswith("bias"):
        return True
    if any(part in name for part in _FACTORS):
        return True
    if module is None:
        return False
    if "trainable_tokens" in name:  # rows of an embedding that peft trains on their own
        return True
    return isinstance(module, nn.Embedding) or "norm" in type(module).__name__.lower()


def undecayed(model: nn.Module) -> frozenset[str]:
    """Names, as in `model.named_parameters()`, of the parameters without weight decay.

    A head that is tied to the embedding counts as the embedding.
    """
    excluded = {
        id(parameter)
        for prefix, module in model.named_modules()
        for name, parameter in module.named_parameters(prefix, recurse=False)
        if no_decay(name, parameter, module)
    }
    return frozenset(n for n, parameter in model.named_parameters() if id(parameter) in excluded)
