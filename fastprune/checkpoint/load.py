"""Load a checkpoint folder through transformers, from local files only.

A folder is foreign data. Its code is never run, no pickled file is opened, and any error that its files cause in
transformers becomes a :class:`~fastprune.errors.FastpruneError`.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastprune.checkpoint.built_size import check_size
from fastprune.checkpoint.config_file import LOCAL, read_config_file, refused
from fastprune.checkpoint.shards import DTYPES, Stored, stored_tensors
from fastprune.errors import ArgumentError, ArtifactError, ModelError, NotFoundError, setting
from fastprune.model.supported import check_config

DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
"""Ways in which accelerate spreads a model over the GPUs of a node."""

_USABLE = 0.9  # of the free memory of a GPU; the rest is for what generation keeps of each token

# A file of this name makes transformers read the folder as a distributed checkpoint of torch, and no other file in it.
_DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")


def load_model(path: str | Path, dtype: str | torch.dtype = "auto", device_map: str | None = None) -> torch.nn.Module:
    """Read a causal LM from a folder, in evaluation mode, on the CPU or spread over the GPUs of a node.

    Args:
        path: Folder with ``config.json`` and safetensors weights.
        dtype: Dtype of the weights; ``"auto"`` keeps the one on disk.
        device_map: One of :data:`DEVICE_MAPS`: which GPU holds which block, as accelerate decides; ``None``: the CPU.
            Nothing is left on the CPU or on disk where there are GPUs. Without any, all of it is on the CPU.

    Raises:
        NotFoundError: There is no such folder, or it holds no ``config.json`` or no safetensors weights.
        ModelError: Its weights are quantized, truncated or incomplete, the config asks for more weights than the folder
            holds, transformers cannot build the model from it, or the GPUs have no room for it.
        ArgumentError: The map is unknown, or accelerate, which makes it, is not installed.
    """
    config = load_config(path)
    try:
        stored = stored_tensors(Path(path))
        check_size(config, stored, path)
    except ArtifactError as error:
        raise ModelError(
            f"the weights in {path} are truncated or no safetensors files ({error})", argument="model"
        ) from error
    places = {} if device_map is None else _places(device_map, path, stored, dtype)
    from transformers import AutoModelForCausalLM

    with refused("model", f"{path} cannot be loaded as a causal language model"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(  # its annotation leaves out the loading info
            os.fspath(path),
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **places,
            **LOCAL,
        )
    model, found = loaded
    # transformers initializes these at random, and only logs it.
    random = sorted({*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])})
    if random:
        raise ModelError(
            f"{path} lacks {len(random)} of the weights of a {type(model).__name__}, or has them in another "
            f"shape, the first is {random[0]}; is the folder whole, and does config.json belong to the weights?",
            argument="model",
        )
    away = sorted({str(place) for place in getattr(model, "hf_device_map", {}).values()} & {"cpu", "disk", "meta"})
    if away and torch.cuda.is_available():
        raise ModelError(
            f"{path} did not fit the GPUs, and part of it is on the {away[0]}; take more of them, or a smaller "
            f"{setting('dtype')}",
            argument="device_map",
        )
    return model.eval()


def _places(
    device_map: str, path: str | Path, stored: Mapping[str, Stored], dtype: str | torch.dtype
) -> dict[str, Any]:
    """Arguments of transformers for a map over the GPUs, after a look at what is free on them."""
    if device_map not in DEVICE_MAPS:
        raise ArgumentError(f"expected one of {', '.join(DEVICE_MAPS)}, got {device_map!r}", argument="device_map")
    if importlib.util.find_spec("accelerate") is None:
        raise ArgumentError(
            f"{device_map!r} needs accelerate; pip install 'fastprune[accelerate]'", argument="device_map"
        )
    if not torch.cuda.is_available():
        return {"device_map": device_map}
    free = {index: int(torch.cuda.mem_get_info(index)[0] * _USABLE) for index in range(torch.cuda.device_count())}
    size = None if isinstance(dtype, str) else dtype.itemsize
    needed = sum(
        tensor.numel * (size or DTYPES.get(tensor.dtype, torch.float32).itemsize) for tensor in stored.values()
    )
    if needed > sum(free.values()):
        raise ModelError(
            f"expected room for the {needed / 2**30:.1f} GiB of {path}, got {sum(free.values()) / 2**30:.1f} GiB on "
            f"{len(free)} GPUs; nothing is kept on the CPU or on disk, where each token would wait for the weights: "
            f"free memory, take more GPUs, or a smaller {setting('dtype')}",
            argument="device_map",
        )
    return {"device_map": device_map, "max_memory": free}  # without "cpu": so nothing is put there


def load_tokenizer(path: str | Path) -> object:
    """Read the tokenizer of a checkpoint folder.

    Raises:
        NotFoundError: There is no such folder, or it holds no ``config.json``.
        ModelError: ``config.json`` holds no JSON object, or transformers finds no tokenizer that it can read.
    """
    _check_folder(path)
    read_config_file(Path(path) / "config.json")  # transformers reads it too
    from transformers import AutoTokenizer

    with refused("tokenizer", f"{path} holds no tokenizer that transformers can read"):
        return AutoTokenizer.from_pretrained(os.fspath(path), **LOCAL)


def load_config(path: str | Path) -> object:
    """Read the config of a checkpoint folder, or a config file on its own.

    Raises:
        NotFoundError: There is no such folder or file, or the folder holds no ``config.json``.
        ModelError: It holds no JSON object, the weights are quantized, a key cannot be or would run foreign code, the
            folder holds adapters, or transformers does not know this kind of model.
    """
    file = Path(path)
    if not file.is_file():
        _check_folder(path)
        _check_plain(file)
        file = file / "config.json"
    check_config(read_config_file(file), f"model {path}")
    from transformers import AutoConfig

    with refused("model", f"{path} holds no config that transformers can read"):
        return AutoConfig.from_pretrained(os.fspath(path), **LOCAL)


def _check_folder(path: str | Path) -> None:
    folder = Path(path)
    if not folder.is_dir():
        raise NotFoundError(
            f"expected a checkpoint folder, found none at {path} (nothing is fetched from a hub)", argument="model"
        )
    if not (folder / "config.json").is_file():
        raise NotFoundError(f"{path} holds no config.json, so it is not a checkpoint folder", argument="model")


def _check_plain(folder: Path) -> None:
    """Refuse folders of which transformers would load other weights than those that are streamed and patched."""
    if (folder / "adapter_config.json").exists():
        raise ModelError(
            f"{folder} holds adapters (adapter_config.json), which are not part of its weights; merge them "
            "(peft: merge_and_unload, save_pretrained), move the file away, or load the model yourself and pass it",
            argument="model",
        )
    if found := sorted(path.name for path in folder.iterdir() if _DISTRIBUTED.match(path.name)):
        raise ModelError(
            f"{folder} holds a distributed checkpoint ({found[0]}); load it with transformers and write it "
            "with save_pretrained",
            argument="model",
        )
