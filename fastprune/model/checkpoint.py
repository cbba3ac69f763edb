"""Load a checkpoint folder through transformers, from local files only."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError

from fastprune.errors import ModelError, NotFoundError
from fastprune.model.admission import check_config


def load_model(path: str | Path, dtype: str | torch.dtype = "auto") -> torch.nn.Module:
    """Read a causal LM from a folder, in evaluation mode, on the CPU.

    Args:
        path: Folder with ``config.json`` and safetensors weights.
        dtype: Dtype of the weights; ``"auto"`` keeps the one on disk.

    Raises:
        NotFoundError: There is no such folder, or it holds no ``config.json``.
        ModelError: Its weights are quantised or incomplete, or transformers cannot build the model from it.
    """
    _check_folder(path)
    _check_unquantised(path)
    from transformers import AutoModelForCausalLM

    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            os.fspath(path),
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except SafetensorError as error:
        raise ModelError(f"model: the weights in {path} are truncated or no safetensors files ({error})") from error
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"model: {path} cannot be loaded as a causal language model: {error}") from error
    # transformers draws these at random, and says so where few look.
    random = sorted({*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])})
    if random:
        raise ModelError(
            f"model: {path} lacks {len(random)} of the weights of a {type(model).__name__}, or has them in another "
            f"shape, the first is {random[0]}; is the folder whole, and does config.json belong to the weights?"
        )
    return model.eval()


def _check_unquantised(path: str | Path) -> None:
    """By the config alone: reading many gigabytes of weights only to refuse them would be unkind."""
    file = Path(path) if Path(path).is_file() else Path(path) / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError(f"it holds a {type(config).__name__}")
    except ValueError as error:
        raise ModelError(f"model: {file} cannot be read as a config: {error}") from error
    check_config(config, f"model {path}")


def load_tokenizer(path: str | Path) -> object:
    """Read the tokenizer of a checkpoint folder.

    Raises:
        NotFoundError: There is no such folder, or it holds no ``config.json``.
        ModelError: transformers finds no tokenizer in it.
    """
    _check_folder(path)
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(os.fspath(path), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"tokenizer: {path} holds no tokenizer that transformers can read: {error}") from error


def _check_folder(path: str | Path) -> None:
    folder = Path(path)
    if not folder.is_dir():
        raise NotFoundError(
            f"model: expected a checkpoint folder, found none at {path} (nothing is fetched from a hub)"
        )
    if not (folder / "config.json").is_file():
        raise NotFoundError(f"model: {path} holds no config.json, so it is not a checkpoint folder")


def load_config(path: str | Path) -> object:
    """Read the config of a checkpoint folder, or a config file on its own.

    Raises:
        NotFoundError: There is no such folder or file, or the folder holds no ``config.json``.
        ModelError: The weights are quantised, or transformers does not know this kind of model.
    """
    if not Path(path).is_file():
        _check_folder(path)
    _check_unquantised(path)
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(os.fspath(path), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"model: {path} holds no config that transformers can read: {error}") from error
