"""What the check before the pass finds: models that cannot be run block by block, or not example by example."""

from __future__ import annotations

import pytest
from architectures import HARM, build, stateful
from torch import nn

import fastprune
from fastprune.calibration import CalibrationSet
from fastprune.errors import ModelError


def score(model: nn.Module, **options: object) -> fastprune.Scores:
    return fastprune.score(model, CalibrationSet(HARM), progress=False, **options)


@pytest.mark.parametrize(("blocks", "segments"), [(3, 2), (3, 3), (4, 2), (4, 3), (4, 4)])
def test_blocks_that_share_state_are_found_however_they_are_cut(blocks: int, segments: int) -> None:
    """Guards factors that cancel below the segments they belong to, the last of which the final norm hides."""
    with pytest.raises(ModelError, match=r"what leaves block \d differs .* computed again .*; use segments=1"):
        score(stateful(build("Llama", num_hidden_layers=blocks)), segments=segments)
