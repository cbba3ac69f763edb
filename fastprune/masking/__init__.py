"""Masks as values, and a live model with a mask on it. Nothing here knows files of a model or scores."""

from fastprune.masking.controls import largest_magnitude_mask, random_mask
from fastprune.masking.mask import PruneMask

__all__ = ["PruneMask", "largest_magnitude_mask", "random_mask"]
