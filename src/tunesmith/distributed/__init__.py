"""Several processes that learn together: who they are, what each does, and how they add up.

The only place, with `train/checkpoint.py`, that knows torch.distributed. A process alone is a group
of one here, for which nothing is imported and nothing is sent.
"""
