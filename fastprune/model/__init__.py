"""A causal LM as the engine sees it: blocks, eligible weights, hooks, state.

On the scoring path, the only room that knows transformers. It must not know criteria.
"""
