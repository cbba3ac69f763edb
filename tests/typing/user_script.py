"""The public interface as a type checker sees it from a user's script.

``make lint`` checks this file and nothing runs it. mypy reports an ignore that hides no error, so that each line with
one asserts an error: the interface has types, and the types are narrow.
"""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

import fastprune
import fastprune.evaluation


def prune(model: transformers.PreTrainedModel, tokenizer: transformers.PreTrainedTokenizerBase, folder: Path) -> None:
    """What the README does, step by step."""
    harm: fastprune.CalibrationSet = fastprune.load_calibration("harm.csv", tokenizer, format="chat")
    benign = fastprune.load_calibration([{"prompt": "Hello", "response": "Hello!"}], tokenizer, format="chat")
    scores: fastprune.Scores = fastprune.score(model, harm, benign, harm=("signed", "wanda"), p_max=0.01, q_max=0.01)
    scores = fastprune.score(folder, harm, benign, memory="8GiB", offload="host", dtype=torch.bfloat16)
    mask: fastprune.PruneMask = scores.select(p=0.01, q=0.005)
    random: fastprune.PruneMask = fastprune.random_mask(model, like=mask, seed=1)
    with mask.applied(model):
        model.eval()
    random.save("random.safetensors")
    fastprune.PruneMask.load("random.safetensors")
    fastprune.patch_checkpoint(folder, mask, "pruned")
    print(fastprune.__version__, mask.total, mask.counts)
    try:
        scores.select(p=2.0, q=0.1)
    except fastprune.FastpruneError as error:
        print(error)

    fastprune.score(model, harm, benign, pmax=3)  # type: ignore[call-arg]
    mask.aplied(model)  # type: ignore[attr-defined]
    scores.select(p=None, q="half")  # type: ignore[arg-type]
    fastprune.scores(model, harm)  # type: ignore[attr-defined]
    fastprune.evaluation.EvaluationSiute  # type: ignore[attr-defined]  # noqa: B018
