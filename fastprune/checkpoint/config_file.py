"""The ``config.json`` of a checkpoint, which is foreign text, checked before transformers acts on it.

In: a file. Out: the JSON object in it, or an error that names the key. Keys that would fetch code, or make transformers
read other files, are refused, and so are numbers from which no model can be built. Nothing of the folder is imported.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from fastprune.errors import FastpruneError, ModelError

LOCAL = {"local_files_only": True, "trust_remote_code": False}
"""Arguments of every call of transformers that takes a folder: otherwise it asks, and a piped "yes" runs code."""

_MAX_BYTES = 16 * 2**20  # the largest published configs have some hundred kilobytes
_LARGEST = 2**31 - 1
# Published models have up to 126 blocks. Configs make lists of this length before weights are compared.
_MAX_LAYERS = 512
# Published models have up to 512 in a block; a plan lists each as matrices of its own.
_MAX_EXPERTS = 4096
_BOUNDS = {"layer": _MAX_LAYERS, "layers": _MAX_LAYERS, "_experts": _MAX_EXPERTS, "num_labels": 2**20}

_POSITIVE = {
    "vocab_size", "hidden_size", "n_embd", "d_model", "num_hidden_layers", "num_layers", "n_layer", "n_layers",
    "num_attention_heads", "num_heads", "n_head", "n_heads", "num_key_value_heads", "head_dim",
}  # fmt: skip
_SIZE_ENDINGS = ("_size", "_dim", "_heads", "_experts", "_layers", "_rank", "_groups", "_positions", "_embeddings")
_SIZES = {*_POSITIVE, "n_inner", "n_positions", "n_ctx", "d_inner", "d_ff", "num_local_experts", "num_labels"}

# Keys that make transformers read other files than those that are scored and patched, or build other layers.
_ELSEWHERE = ("configuration_files", "transformers_weights", "fusion_config")
_OWN_LOADING = "or load the model yourself and pass it instead of its folder"
_FLASH_PACKAGES = ("flash_attn", "flash_attn_interface")


@contextlib.contextmanager
def refused(argument: str, what: str) -> Iterator[None]:
    """Turn any error of transformers about a foreign file into a ModelError.

    The kinds of errors depend on the architecture: its code divides by sizes, looks up names, recurses.

    Args:
        argument: The argument that named the file.
        what: What failed.
    """
    try:
        yield
    except FastpruneError:
        raise
    except Exception as error:
        # The advice of transformers would be to let the code run; this error has no class of its own.
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"{what}: expected a kind that transformers has itself, got one that comes with code of its own "
                "(auto_map), which is never run here; read the code, load the model yourself and pass it instead of "
                "its folder",
                argument=argument,
            ) from error
        raise ModelError(f"{what}: {type(error).__name__}: {error}", argument=argument) from error


def read_config_file(file: Path) -> dict[str, Any]:
    """Read a ``config.json``.

    Args:
        file: An existing file.

    Returns:
        The object in it.

    Raises:
        ModelError: It holds no JSON object, or a key names a repository of attention kernels, an attention that is not
            installed, other files, no dtype, or a size of which no model can be made; the message names the key.
    """
    try:
        if file.stat().st_size > _MAX_BYTES:
            raise ValueError(f"expected at most {_MAX_BYTES} bytes, got {file.stat().st_size}")
        config = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError(f"expected an object, got a {type(config).__name__}")
        entries = list(_entries(config))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file} cannot be read as a config: {error}", argument="model") from error
    for place, key, value in entries:
        _check_entry(f"{file}: {place}", key, value)
    for key in _ELSEWHERE:
        if (found := next((at for at, name, value in entries if name == key and value), None)) is not None:
            raise ModelError(
                f"{file}: {found}: expected a config without this key, by which transformers leaves the files and "
                f"layers that are scored here; remove it, {_OWN_LOADING}"
            )
    return config


def _entries(config: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, str, Any]]:
    """``(place, key, value)`` of an object and of all objects in it, however deep."""
    for key, value in config.items():
        here = f"{place}.{key}" if place else key
        yield here, key, value
        for number, part in enumerate(value if isinstance(value, list) else [value]):
            if isinstance(part, Mapping):
                yield from _entries(part, here if part is value else f"{here}[{number}]")


def _check_entry(place: str, key: str, value: Any) -> None:
    if key.endswith(("attn_implementation", "experts_implementation")):
        if not isinstance(value, str | Mapping | None):
            raise ModelError(f"{place}: expected the name of an implementation, got {_shown(value)}")
        for name in _strings(value):
            _check_implementation(place, name)
    elif key in ("dtype", "torch_dtype"):
        if not isinstance(value, Mapping) and value not in (None, "auto") and not _is_dtype(value):
            raise ModelError(f"{place}: expected the name of a dtype such as bfloat16, got {_shown(value)}")
    elif isinstance(value, float) and math.isnan(value):
        raise ModelError(f"{place}: expected a number, got NaN")
    elif isinstance(value, int) and abs(value) >= 2**63:
        raise ModelError(f"{place}: expected a number of 64 bits, got {_shown(value)}")
    elif isinstance(value, int) and not isinstance(value, bool) and (key in _SIZES or key.endswith(_SIZE_ENDINGS)):
        low = 1 if key in _POSITIVE else -1  # in some configs -1 means none
        high = next((bound for ending, bound in _BOUNDS.items() if key.endswith(ending)), _LARGEST)
        if not low <= value <= high:
            raise ModelError(f"{place}: expected a size of {max(0, low)} … {high}, got {_shown(value)}")


def _check_implementation(place: str, name: str) -> None:
    name = name.removeprefix("paged|")
    if "/" in name:
        raise ModelError(
            f"{place}: expected an implementation that transformers has, such as sdpa or eager, got the repository "
            f"{_shown(name)}, whose code would be downloaded and run; remove the key, {_OWN_LOADING}"
        )
    # Without the package, transformers would download one from a hub.
    if name.startswith("flash_attention") and not any(map(importlib.util.find_spec, _FLASH_PACKAGES)):
        raise ModelError(
            f"{place}: expected an attention that is installed, such as sdpa or eager, got {_shown(name)}; remove the "
            "key, or install flash_attn"
        )


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _strings(part)


def _is_dtype(value: Any) -> bool:
    return isinstance(value, str) and isinstance(getattr(torch, value, None), torch.dtype)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"
