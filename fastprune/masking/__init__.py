"""Which weights go, and how they go and come back: selection, masks, controls, checkpoints; no gradients."""

from fastprune.masking.controls import largest_magnitude_mask, random_mask
from fastprune.masking.mask import PruneMask
from fastprune.masking.patch import patch_checkpoint, patch_in_place, undo_patch

__all__ = [
    "PruneMask",
    "largest_magnitude_mask",
    "patch_checkpoint",
    "patch_in_place",
    "random_mask",
    "undo_patch",
]
