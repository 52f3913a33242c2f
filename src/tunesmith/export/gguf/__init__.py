"""GGUF export: written, read back, and compared with the trained model."""

from tunesmith.export.gguf.check import KL_ALLOWED, GgufReport
from tunesmith.export.gguf.write import QUANTIZATIONS, export_gguf

__all__ = ["KL_ALLOWED", "QUANTIZATIONS", "GgufReport", "export_gguf"]
