"""Quantised bases (QLoRA): bitsandbytes and torchao, dequantised products, FSDP2."""
