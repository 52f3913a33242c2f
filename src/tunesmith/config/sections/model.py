"""The recipe's section `model`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tunesmith.config.sections.base import Section


class ModelSection(Section):
    """The pretrained model."""

    name: str = Field(
        min_length=1,
        description="hub id, folder in Hugging Face format, .gguf file, or a run folder",
    )
    dtype: Literal["auto", "bfloat16", "float32"] = Field(
        default="auto",
        description="precision of forward and backward; updates are float32-accurate in either",
    )
    quantization: Literal[
        "none", "nf4", "fp4", "int8", "torchao_int8", "torchao_fp8", "torchao_int4"
    ] = Field(
        default="none",
        description="bits that the frozen base is kept in while an adapter is trained",
    )
    double_quantization: bool = Field(
        default=False, description="nf4 and fp4: quantise the scales as well"
    )
    float8: Literal["none", "rowwise"] = Field(
        default="none",
        description="rowwise: the decoder's linear maps multiply in 8-bit floats while training, "
        "with a scale for each row; on a GPU by NVIDIA with capability 8.9 or more",
    )
    revision: str | None = Field(default=None, description="branch, tag or commit of a hub model")
    trust_remote_code: bool = Field(
        default=False, description="run Python code that the model's folder brings along"
    )
