"""The files of this package: one safetensors file each, with its kind, version and facts as JSON in the metadata.

In: tensors and a JSON-able dict. Out: the same again, or an error that says what the file is instead. Nothing is
unpickled. It must not know what the tensors mean.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fastprune.errors import ArtifactError, NotFoundError

VERSION = 1


def write_artifact(
    path: str | Path,
    kind: str,
    tensors: Mapping[str, torch.Tensor],
    content: Mapping[str, Any],
    *,
    durable: bool = False,
) -> Path:
    """Write a file under a temporary name and move it into place, so that no half-written file ever has the final name.

    Args:
        path: Where to; an existing file is replaced.
        kind: What it is, e.g. ``"mask"``.
        tensors: Named tensors on any device.
        content: Facts, JSON-able.
        durable: Return only when file and name would survive a power cut.

    Returns:
        The path.

    Raises:
        NotFoundError: The folder does not exist.
        ArtifactError: ``content`` is not JSON-able.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise NotFoundError(f"cannot write {path}: the folder {path.parent} does not exist")
    try:
        text = json.dumps(content)
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"cannot write {path}: its metadata is not JSON-able ({error})") from error
    metadata = {"format": "fastprune", "kind": kind, "version": str(VERSION), "content": text}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_tensors(temporary, tensors, metadata)
        if durable:
            sync(temporary)
        temporary.replace(path)
        if durable:
            sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def sync(path: Path) -> None:
    """Make the contents of a file, or the names in a folder, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file with the permissions that the user's umask gives; its writer alone makes it private."""
    path.touch()
    mode = path.stat().st_mode
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path, dict(metadata))
    path.chmod(mode)


def read_artifact(path: str | Path, kind: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read a file of :func:`write_artifact`.

    Args:
        path: The file.
        kind: What it has to be.

    Returns:
        ``(tensors, content)``, the tensors on the CPU.

    Raises:
        NotFoundError: There is no such file.
        ArtifactError: It is truncated, no safetensors file, not one of this package, of another kind or of a newer
            version.
    """
    path = Path(path)
    if not path.is_file():
        raise NotFoundError(f"{kind} file {path} does not exist or is not a file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            _check_metadata(metadata, kind, path)
            content = json.loads(metadata["content"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - safe_open is no mapping
    except SafetensorError as error:
        raise ArtifactError(f"{path} is truncated or no safetensors file ({error})") from error
    except (KeyError, json.JSONDecodeError) as error:
        raise ArtifactError(f"{path}: the metadata of this {kind} file cannot be read ({error})") from error
    return tensors, content


def _check_metadata(metadata: Mapping[str, str], kind: str, path: Path) -> None:
    if metadata.get("format") != "fastprune":
        raise ArtifactError(
            f"{path} was not written by fastprune (format {metadata.get('format')!r}); expected a {kind} file"
        )
    if metadata.get("kind") != kind:
        raise ArtifactError(f"{path} is a {metadata.get('kind')} file, expected a {kind} file")
    if metadata.get("version") != str(VERSION):
        raise ArtifactError(f"{path} has version {metadata.get('version')}, this fastprune reads version {VERSION}")
