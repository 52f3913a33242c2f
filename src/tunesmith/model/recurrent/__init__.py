"""Recurrent layers (state-space models, linear attention, short convolutions) on packed documents
and prefix trees.

A recurrent layer reads its tokens in one order and carries a state from each to the next. In a
packed micro-batch the token before a document belongs to its neighbour, and in a prefix tree
several branches continue one token. So the state is handed over at branch points
(`levels.py`, `handover.py`), and convolutions take their inputs along the path of each token
(`convolution.py`). `replace.py` puts this into the mixers of a transformers model.
"""
