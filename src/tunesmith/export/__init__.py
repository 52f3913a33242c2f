"""The trained model as a folder for transformers, peft, GGUF and others."""

from tunesmith.export.card import DataEntry, ModelCard, TemplateChoice, read_choice
from tunesmith.export.folder import write_model

__all__ = ["DataEntry", "ModelCard", "TemplateChoice", "read_choice", "write_model"]
