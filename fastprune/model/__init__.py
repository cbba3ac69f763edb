"""A causal LM as the engine sees it: blocks, eligible weights, hooks, state.

The room that knows transformers' models; scoring asks it, and builds from a config alone to weigh one. It must not know
criteria.
"""
