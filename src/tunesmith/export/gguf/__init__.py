"""The trained model as one .gguf file, read back and compared before it gets its name."""

from tunesmith.export.gguf.check import KL_ALLOWED, GgufReport
from tunesmith.export.gguf.write import QUANTIZATIONS, export_gguf

__all__ = ["KL_ALLOWED", "QUANTIZATIONS", "GgufReport", "export_gguf"]
