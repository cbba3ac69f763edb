"""How files and folders are written: whole or not at all, by one process at a time, whoever is killed meanwhile.

In: a path. Out: a temporary place to write to, which takes that name when the writer is done. What a killed process
left behind is removed by the next one that writes under the same name; what a living process writes is locked, and
stays.
It must not know what the files mean.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from fastprune.errors import ArgumentError, ArtifactError, DiskError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def as_path(value: object, argument: str) -> Path:
    """The path that a caller has named.

    Raises:
        ArgumentError: It is neither a string nor a path, holds a NUL, or is empty, which would be the current folder.
    """
    if not isinstance(value, str | os.PathLike) or not os.fspath(value) or "\0" in os.fsdecode(value):
        raise ArgumentError(f"expected a path, got {value!r}", argument=argument)
    return Path(value)


def sha256(path: Path) -> str:
    """SHA-256 of a file, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
    return _lock(handle) is not False


def inside(path: Path, folder: Path) -> bool:
    """Whether a path, which need not exist, is a folder or lies below it; links are followed."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def is_full(error: OSError) -> bool:
    """Whether it says that the disk, a quota or the largest allowed size of a file is used up."""
    return error.errno in _FULL


def check_space(folder: Path, needed: int, what: str) -> None:
    """Refuse to begin what cannot be finished. A quota is seen only when it is met.

    Args:
        folder: A folder of the disk in question.
        needed: Bytes.
        what: What they are for.

    Raises:
        DiskError: There is less; says how much.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DiskError(
            f"{what}: expected {_size(needed)} of free space on the disk of {folder}, got {_size(free)}; free some "
            "space, or name another folder"
        )


@contextlib.contextmanager
def scratch(folder: Path, prefix: str) -> Iterator[Path]:
    """A new folder, locked, for what is not finished; gone after the block, with all that is left in it.

    Folders of this prefix whose process was killed are removed first.

    Args:
        folder: Where to make it.
        prefix: How its name begins; nobody else's names may begin like that.
    """
    _sweep(folder, prefix)
    path, handle = _locked_folder(folder, prefix)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(handle)


@contextlib.contextmanager
def replacing(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """A path to write a file or a folder to, which is moved to ``path`` when the block is left without an error.

    A link is followed: what it points at is replaced, not the link.

    Args:
        path: The final name; the folder that it is in has to exist. An existing file is replaced, and so is a folder
            if it is empty.
        durable: Return only when content and name would survive a power cut.

    Raises:
        DiskError: The disk is full, or a quota is met.
        OSError: Anything else that the file system refuses.
    """
    path = Path(os.path.realpath(path))
    try:
        with scratch(path.parent, f".{path.name}.fastprune-") as folder:
            temporary = folder / path.name
            yield temporary
            if durable:
                for written in (*(temporary.rglob("*") if temporary.is_dir() else ()), temporary):
                    sync(written)
            temporary.replace(path)
            if durable:
                sync(path.parent)
    except OSError as error:
        if not is_full(error):
            raise
        raise _full(path, error) from error


@contextlib.contextmanager
def private_replacing(path: Path) -> Iterator[Path]:
    """As :func:`replacing`, durable, for a file that only its owner may read: at no time may anybody else."""
    with replacing(path, durable=True) as temporary:  # in a folder that tempfile made for the owner alone
        temporary.touch(mode=0o600)
        yield temporary
        temporary.chmod(0o600)  # the writer may have made another file of this name


class JsonLines:
    """A file of JSON objects, one a line, that grows by one write a line and is for its owner alone (mode 0600).

    A kill leaves whole lines and perhaps a torn last one, which is cut off when the file is opened again.

    Args:
        path: Made if it does not exist; its folder has to.
        argument: How messages call it.

    Raises:
        ArgumentError: Another process is writing to it.
        ArtifactError: A line before the last one is no JSON object.
        DiskError: The disk is full, or a quota is met.
    """

    def __init__(self, path: Path, argument: str) -> None:
        self.path = path
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            if not try_lock(self._handle) or not _is_still(path, self._handle):  # its last writer may have removed it
                raise ArgumentError(
                    f"expected a file that nobody else is writing to, got {path}, which another process is writing to "
                    "now; wait for its end, or name another",
                    argument=argument,
                )
            os.fchmod(self._handle, 0o600)
            records, size = _whole_lines(path)
            if size < os.fstat(self._handle).st_size:
                os.ftruncate(self._handle, size)
        except BaseException:
            os.close(self._handle)
            raise
        self.records = records
        """What the file held when it was opened."""

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a line. It is whole for whoever reads the file, but survives a power cut only once it is closed."""
        line = json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        begin = os.fstat(self._handle).st_size
        try:
            while line:  # a signal or a full disk may shorten a write
                line = line[os.write(self._handle, line) :]
        except OSError as error:
            os.ftruncate(self._handle, begin)
            if not is_full(error):
                raise
            raise _full(self.path, error) from error

    def clear(self) -> None:
        """Begin anew."""
        os.ftruncate(self._handle, 0)
        self.records = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        try:
            os.fsync(self._handle)
        finally:
            os.close(self._handle)


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of :class:`JsonLines`; a torn last one is left out.

    Raises:
        ArtifactError: A line before the last one is no JSON object.
    """
    return _whole_lines(path)[0]


@contextlib.contextmanager
def claimed(path: Path, argument: str) -> Iterator[None]:
    """Keep a name for this process: another one that wants to write there at the same time is refused.

    Args:
        path: The file or folder that will be written; the folder that it is in has to exist.
        argument: How messages call it.

    Raises:
        ArgumentError: Another process has it.
    """
    path = Path(os.path.realpath(path))
    lock = path.with_name(f".{path.name}.fastprune.lock")
    while True:
        handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        if not try_lock(handle):
            os.close(handle)
            raise ArgumentError(
                f"expected a name that nobody else is writing to, got {path}, which another process is "
                "writing now; wait for its end, or name another",
                argument=argument,
            )
        if _is_still(lock, handle):
            break
        os.close(handle)  # its last holder has removed it in between
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)  # while it is held: who waits for it takes a new one
        os.close(handle)


def _whole_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The whole lines of a file, and the number of bytes that they take."""
    content = path.read_bytes()
    size = content.rfind(b"\n") + 1  # what follows was torn by a kill
    records = []
    for number, line in enumerate(content[:size].split(b"\n")[:-1], start=1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise ArtifactError(
                f"{path}, line {number}: expected a JSON object, got something else; the file was changed by another "
                "program, or its disk is damaged: restore it from a copy, or begin anew without it"
            )
        records.append(record)
    return records, size


def _full(path: Path, error: OSError) -> DiskError:
    return DiskError(
        f"cannot write {path}: its disk is full, or a quota is met ({error.strerror}); free some space, or name "
        "another folder"
    )


def _lock(handle: int) -> bool | None:
    """As :func:`try_lock`, ``None`` where there are no locks."""
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        return None
    return True


def _locked_folder(folder: Path, prefix: str) -> tuple[Path, int]:
    while True:
        path = Path(tempfile.mkdtemp(".tmp", prefix, folder))
        handle = -1
        with contextlib.suppress(FileNotFoundError):
            handle = os.open(path, os.O_RDONLY)
            if try_lock(handle) and _is_still(path, handle):
                return path, handle
        if handle >= 0:  # swept by another process before it was locked
            os.close(handle)


def _sweep(folder: Path, prefix: str) -> None:
    left = re.compile(re.escape(prefix) + r"[a-z0-9_]{8}\.tmp")  # as tempfile names them
    with contextlib.suppress(OSError):
        for entry in os.scandir(folder):
            if left.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
                with contextlib.suppress(OSError):
                    handle = os.open(entry.path, os.O_RDONLY)
                    try:
                        if _lock(handle):  # not where nobody could have locked it
                            shutil.rmtree(entry.path, ignore_errors=True)
                    finally:
                        os.close(handle)


def _is_still(path: Path, handle: int) -> bool:
    """Whether a name is still that of an open file."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(handle))
    except FileNotFoundError:
        return False


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.2f} GiB" if n_bytes >= 2**28 else f"{n_bytes / 2**20:.2f} MiB"
