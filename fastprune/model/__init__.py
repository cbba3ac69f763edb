"""Causal LMs of transformers: their blocks, eligible weights, hooks and state."""
