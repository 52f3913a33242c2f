"""Low-level operations: checkpointing, offload, dtype, forward overrides."""
