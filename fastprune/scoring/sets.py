"""The calibration sets of a pass: read, and checked against the model.

In: the loaders of a request. Out: calibration sets with the size of their micro-batches.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping

from torch import nn

from fastprune.calibration import CalibrationLoader, CalibrationSet, collect
from fastprune.errors import CalibrationError, setting, warn
from fastprune.model.positions import rotary_conflict, table_size, trained_length
from fastprune.model.vocabulary import predictable_tokens, readable_tokens
from fastprune.planning.plan import MICRO_BATCH_TOKENS
from fastprune.scoring.request import Source

# Share of a set's loss on end-of-turn tokens above which it is pointed out. Whole replies of an instruct model have a
# few percent there; replies of SmolLM2 that had been cut at 56 tokens had 69 %.
_LARGE_SHARE = 0.25


def read_sets(sources: Mapping[str, Source], model: nn.Module) -> dict[str, CalibrationLoader]:
    """Read the examples of each role.

    Args:
        sources: Loaders, as :func:`fastprune.score` takes them, by role.
        model: The causal LM.

    Returns:
        For each role its set, cut into micro-batches as its loader says, if that says anything.

    Raises:
        CalibrationError: A loader yields nothing or something malformed, or the model has no positions for an example.

    Warns:
        FastpruneWarning: Examples are longer than those that the model was made for, or two roles have the same.
    """
    accepted = inspect.signature(model.forward).parameters
    loaders = {}
    for role, source in sources.items():
        name = f"{role}_loader"
        examples = collect(source, name, readable_tokens(model), predictable_tokens(model), accepted)
        _check_lengths(name, examples, model)
        loaders[role] = examples.loader(getattr(source, "batch_tokens", MICRO_BATCH_TOKENS))
    if len({loader.calibration.hash for loader in loaders.values()}) < len(loaders):
        warn("harm_loader and benign_loader hold the same examples, so what is protected is what is pruned")
    return loaders


def note_ends_of_turn(loaders: Mapping[str, CalibrationLoader], shares: Mapping[str, float]) -> None:
    """Point out a set whose loss lies largely on end-of-turn tokens, unless it says how its replies ended.

    Args:
        loaders: Sets by role.
        shares: Share of the loss of each set on end-of-turn tokens.
    """
    for role, loader in loaders.items():
        share = shares.get(role, 0.0)
        if share > _LARGE_SHARE and loader.calibration.finishes["unknown"]:
            warn(
                f"{role}_loader: the end-of-turn token carries {share:.0%} of the loss, so the scores are "
                f"largely about ending the reply; for replies that were cut give {setting('finish', 'length')} (or a "
                "column "
                f"finish), for whole ones {setting('finish', 'stop')}"
            )


def _check_lengths(name: str, examples: CalibrationSet, model: nn.Module) -> None:
    """Refuse an example that the model has no positions for, or that would change how the model reads others."""
    limit = table_size(model)
    for index, example in enumerate(examples):
        if limit is not None and len(example) > limit:
            raise CalibrationError(
                f"{name}, example {index}: {len(example)} tokens, but the model has positions for {limit}; nothing is "
                "cut, shorten or drop it"
            )
    limit = trained_length(model)
    longer = [index for index, example in enumerate(examples) if limit is not None and len(example) > limit]
    if longer:
        warn(
            f"{name}: {len(longer)} examples, the first is example {longer[0]}, are longer than the {limit} tokens "
            "that the model was made for; they count like any other"
        )
    conflict = rotary_conflict(model, [(len(example), len(example)) for example in examples])
    if conflict is not None:
        index, reason = conflict
        raise CalibrationError(
            f"{name}, example {index}: {len(examples.examples[index])} tokens; {reason}; load the set with a "
            "max_length, which drops such examples and counts them"
        )
