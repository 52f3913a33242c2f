"""Data scoring with a model, and data selection by scores."""
