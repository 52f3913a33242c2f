"""The model: loading, adapters, attention, quantization, kernels, memory."""
