"""Preprocessing: rows rendered in parallel, cached, and entered in the ledger."""
