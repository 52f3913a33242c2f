"""The language model: loading, attention, adapters, quantization, kernels and memory."""
