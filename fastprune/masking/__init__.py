"""Masks as values, and masks on a model in memory."""

from fastprune.masking.controls import largest_magnitude_mask, random_mask
from fastprune.masking.mask import PruneMask

__all__ = ["PruneMask", "largest_magnitude_mask", "random_mask"]
