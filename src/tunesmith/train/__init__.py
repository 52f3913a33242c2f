"""The training loop: steps, their loss, evaluations, and what is due between them."""
