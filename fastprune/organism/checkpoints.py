"""The organism's checkpoint folders: the shipped ones, and how one is written and loaded.

A folder is an ordinary Hugging Face checkpoint (config, generation config, safetensors, tokenizer). Weights are stored
in bfloat16 and the config says float32, so that every loader that follows the config computes in float32.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from fastprune.errors import ArgumentError, NotFoundError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

STAGES = ("base", "sft", "aligned")
"""Trained from scratch; then fine-tuned on the alignment data without refusals (control); or with them."""


def checkpoint_path(stage: str = "aligned") -> Path:
    """Folder of a shipped checkpoint.

    Raises:
        ArgumentError: Unknown stage.
        NotFoundError: The installation lacks the checkpoint.
    """
    if stage not in STAGES:
        raise ArgumentError(f"expected one of {', '.join(STAGES)}, got {stage!r}", argument="stage")
    folder = Path(__file__).parent / "checkpoints" / stage
    if not (folder / "config.json").is_file():
        raise NotFoundError(f"this installation has no checkpoint {stage!r} at {folder}", argument="stage")
    return folder


def load_organism(
    stage: str = "aligned", *, root: str | os.PathLike | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A checkpoint as ``(model, tokenizer)``: float32, on the CPU, in evaluation mode.

    Args:
        stage: ``"aligned"``, ``"base"`` or ``"sft"``.
        root: A folder that ``train_organism`` wrote; None: the shipped checkpoints.

    Raises:
        ArgumentError: Unknown stage.
        NotFoundError: There is no such checkpoint.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = checkpoint_path(stage) if root is None else Path(root) / stage
    if not (folder / "config.json").is_file():
        raise NotFoundError(f"expected a checkpoint folder at {folder}, found none", argument="root")
    with _no_progress_bar():
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, local_files_only=True, trust_remote_code=False
        )
    return model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def save_checkpoint(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | os.PathLike,
    origin: Mapping[str, object],
) -> None:
    """Write a checkpoint folder, all of it or nothing.

    Args:
        model: Its weights should be bfloat16 values already (:func:`round_weights_`); the file keeps no more.
        tokenizer: Saved into the same folder.
        folder: Must not exist.
        origin: Facts about the training, written as ``training.json``.

    Raises:
        ArgumentError: ``folder`` exists.
    """
    import torch

    from fastprune.artifact import save_tensors
    from fastprune.files import replacing

    folder = Path(folder)
    if folder.exists():
        raise ArgumentError(f"expected a new folder, {folder} exists", argument="folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with replacing(folder) as scratch:
        scratch.mkdir()
        weights = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
        save_tensors(scratch / "model.safetensors", weights, {"format": "pt"})
        model.config.save_pretrained(scratch)
        config = json.loads((scratch / "config.json").read_text())
        _write_json(scratch / "config.json", config | {"architectures": [type(model).__name__], "dtype": "float32"})
        _write_json(scratch / "training.json", origin)
        model.generation_config.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch, save_jinja_files=False)


def round_weights_(model: torch.nn.Module) -> None:
    """Round every weight to a bfloat16 value in place, so that what is measured is what is stored."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))


def _write_json(path: Path, content: Mapping) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


@contextlib.contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Hide transformers' progress bar: for a model that loads in milliseconds it only fills logs."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
