"""Distributed training with torch.distributed: data, context and tensor parallelism, and FSDP2.

This room and `checkpoint/` alone know torch.distributed. A single process is a world of size one
here, for which nothing is imported and nothing is sent.
"""
