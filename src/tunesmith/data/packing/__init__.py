"""Sequence packing: bin packing of documents into packs of a fixed length."""
