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
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from fastprune.errors import ArtifactError, DiskError, NotFoundError
from fastprune.files import as_path, replacing

if TYPE_CHECKING:
    import torch

# Raised for each kind by itself when its content changes.
VERSIONS = {
    "scores": 3,  # 2 had no share of refusals, 1 no hash
    "mask": 3,  # 2 did not say where masks of other masks come from
    "undo": 2,
    "segment": 2,
}
_MADE_BY = {
    "scores": "make it again with `fastprune score`",
    "mask": "make it again with `fastprune select` (a control: `fastprune control`)",
    "undo": "undo the patch with the fastprune that wrote it, or patch the original checkpoint again with `fastprune "
    "patch`",
    "segment": "remove the journal's folder and run `fastprune score --resume` again",
}
_ENTRY = "fastprune"


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
        kind: What it is: one of :data:`VERSIONS`.
        tensors: Named tensors on any device.
        content: Facts, JSON-able.
        durable: Return only when file and name would survive a power cut.

    Returns:
        The path.

    Raises:
        NotFoundError: The folder does not exist.
        ArtifactError: ``content`` is not JSON-able, or ``path`` is a folder.
        DiskError: The disk is full, or refuses the file.
    """
    path = as_path(path, "path")
    if not (folder := Path(os.path.realpath(path)).parent).is_dir():
        raise NotFoundError(f"cannot write {path}: the folder {folder} does not exist")
    if path.is_dir():
        raise ArtifactError(f"cannot write {path}: it is a folder; name a file")
    facts = {"kind": kind, "version": VERSIONS[kind], "content": content}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        text = json.dumps({**facts, "sha256": _hash(tensors, json.dumps(facts))})
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"cannot write {path}: its metadata is not JSON-able ({error})") from error
    with replacing(path, durable=durable) as temporary:
        save_tensors(temporary, tensors, {_ENTRY: text})
    return path


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file with the permissions that the user's umask gives; its writer alone makes it private."""
    from safetensors.torch import save_file

    path.touch()
    mode = path.stat().st_mode
    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path, dict(metadata))
    except UnicodeEncodeError as error:  # half a surrogate pair in a name
        raise ArtifactError(f"cannot write {path.name}: a tensor's name is no text that a file can hold") from error
    except SafetensorError as error:  # its way of saying what any other writer says by an OSError
        raise DiskError(f"cannot write {path.name}: {error}; free some space, or name another folder") from error
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


def kind_of(path: Path) -> str | None:
    """What a file is by its own words, of whatever version, or ``None`` if it is no artifact of this package."""
    try:
        with safe_open(path, framework="np") as file:  # of the header alone; "pt" would load torch
            return str(json.loads((file.metadata() or {})[_ENTRY])["kind"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None


def _hash(tensors: Mapping[str, torch.Tensor], text: str) -> str:
    """Of everything that a file holds; the tensors are on the CPU and contiguous."""
    import torch

    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _facts(metadata: Mapping[str, str], kind: str, path: Path) -> tuple[dict[str, Any], str]:
    if _ENTRY not in metadata:
        raise ArtifactError(f"{path} was not written by fastprune; expected a {kind} file")
    found = json.loads(metadata[_ENTRY])
    if found["kind"] != kind:
        raise ArtifactError(f"{path} is a {found['kind']} file, expected a {kind} file")
    if found["version"] != VERSIONS[kind]:
        raise ArtifactError(
            f"{path} has version {found['version']}, this fastprune reads version {VERSIONS[kind]} of {kind} files; "
            f"{_MADE_BY[kind]}"
        )
    expected = found.pop("sha256")
    return found, expected
