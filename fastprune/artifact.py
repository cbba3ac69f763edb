"""The files of this package: one safetensors file each, with its kind, version and facts as JSON in the metadata.

All of these are one entry of the metadata: the format's writer puts several in any order, and equal runs are to give
equal files.

In: tensors and a JSON-able dict. Out: the same again, down to the bit, or an error that says what the file is instead.
Nothing is unpickled. It must not know what the tensors mean.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fastprune.errors import ArgumentError, ArtifactError, NotFoundError

VERSION = 2  # 1 had no hash
_ENTRY = "fastprune"


def as_path(value: object, argument: str) -> Path:
    """The path that a caller has named.

    Raises:
        ArgumentError: It is neither a string nor a path, or it is empty, which would be the current folder.
    """
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        raise ArgumentError(f"{argument}: expected a path, got {value!r}")
    return Path(value)


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
        ArtifactError: ``content`` is not JSON-able, or ``path`` is a folder.
    """
    path = as_path(path, "path")
    if not path.parent.is_dir():
        raise NotFoundError(f"cannot write {path}: the folder {path.parent} does not exist")
    if path.is_dir():
        raise ArtifactError(f"cannot write {path}: it is a folder; name a file")
    facts = {"kind": kind, "version": VERSION, "content": content}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        text = json.dumps({**facts, "sha256": _hash(tensors, json.dumps(facts))})
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"cannot write {path}: its metadata is not JSON-able ({error})") from error
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_native_id()}.tmp")
    try:
        save_tensors(temporary, tensors, {_ENTRY: text})
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


def try_lock(handle: int) -> bool:
    """Lock an open file or folder until it is closed; ``False`` if another process, or another opening, has locked it.

    Where there are no such locks (no POSIX system, file systems of some clusters), two at once are the user's risk.
    """
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        return True
    return True


def sha256(path: Path) -> str:
    """SHA-256 of a file, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
        ArtifactError: It is truncated, no safetensors file, not one of this package, of another kind or version, or
            not as it was written.
    """
    path = as_path(path, "path")
    if not path.is_file():
        raise NotFoundError(f"{kind} file {path} does not exist or is not a file")
    try:
        with safe_open(path, framework="pt") as file:
            facts, expected = _facts(file.metadata() or {}, kind, path)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - safe_open is no mapping
    except SafetensorError as error:
        raise ArtifactError(f"{path} is truncated or no safetensors file ({error})") from error
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ArtifactError(f"{path}: the metadata of this {kind} file cannot be read ({error})") from error
    if _hash(tensors, json.dumps(facts)) != expected:
        raise ArtifactError(f"{path}: this {kind} file is damaged: its contents are not those that were written")
    return tensors, facts["content"]


def _hash(tensors: Mapping[str, torch.Tensor], text: str) -> str:
    """Of everything that a file holds; the tensors are on the CPU and contiguous."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _facts(metadata: Mapping[str, str], kind: str, path: Path) -> tuple[dict[str, Any], str]:
    if _ENTRY not in metadata:
        raise ArtifactError(f"{path} was not written by fastprune; expected a {kind} file")
    found = json.loads(metadata[_ENTRY])
    if found["kind"] != kind:
        raise ArtifactError(f"{path} is a {found['kind']} file, expected a {kind} file")
    if found["version"] != VERSION:
        raise ArtifactError(f"{path} has version {found['version']}, this fastprune reads version {VERSION}")
    expected = found.pop("sha256")
    return found, expected
