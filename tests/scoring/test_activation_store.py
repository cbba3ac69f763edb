"""Hidden states between segments: the same bits back from every tier, files freed, a full disk said clearly."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch

from fastprune.errors import ScoringError
from fastprune.planning.segments import OFFLOADS
from fastprune.scoring import activation_store
from fastprune.scoring.activation_store import ActivationStore

CPU = torch.device("cpu")


def tensors() -> list[torch.Tensor]:
    """Two micro-batches of odd shapes, strides and dtypes, with values that only bits tell apart."""
    first = torch.randn(3, 7, 5)[:, ::2]
    first[0, 0, 0], first[0, 0, 1] = -0.0, float("nan")
    return [first, torch.randn(2, 1, 5, dtype=torch.bfloat16)]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    as_integers = torch.int32 if a.dtype == torch.float32 else torch.int16
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(as_integers), b.contiguous().view(as_integers))


@pytest.mark.parametrize("tier", OFFLOADS)
def test_bits_come_back(tier: str, tmp_path: Path) -> None:
    store = ActivationStore(tier, CPU, tmp_path)
    kept = tensors()
    for item, tensor in enumerate(kept):
        store.put("boundary-0", item, tensor)
        store.put("boundary-1", item, tensor + 1)
    for item, tensor in enumerate(kept):
        assert same_bits(store.get("boundary-0", item), tensor)
        assert same_bits(store.get("boundary-0", item), tensor)
        assert same_bits(store.take("boundary-0", item), tensor)
    store.drop("boundary-0")
    assert not store.holds("boundary-0") and store.holds("boundary-1")
    store.drop("nothing")
    assert same_bits(store.get("boundary-1", 1), kept[1] + 1)
    store.drop("boundary-1")
    assert not list(tmp_path.iterdir())
    store.close()


def test_an_earlier_runs_file_is_overwritten_from_its_start(tmp_path: Path) -> None:
    (tmp_path / "boundary-0.bin").write_bytes(b"x" * 10_000)
    store = ActivationStore("disk", CPU, tmp_path)
    store.put("boundary-0", 0, torch.ones(2, 2))
    assert (tmp_path / "boundary-0.bin").stat().st_size == 16


def test_a_sealed_file_is_taken_over_only_as_it_was(tmp_path: Path) -> None:
    store, kept = ActivationStore("disk", CPU, tmp_path), tensors()
    for item, tensor in enumerate(kept):
        store.put("boundary-3", item, tensor)
    record = store.sealed("boundary-3")
    other = ActivationStore("disk", CPU, tmp_path)
    assert other.reopen(record)
    assert all(same_bits(other.get("boundary-3", item), tensor) for item, tensor in enumerate(kept))
    path = tmp_path / "boundary-3.bin"
    content = bytearray(path.read_bytes())
    content[17] ^= 1
    path.write_bytes(content)
    assert not ActivationStore("disk", CPU, tmp_path).reopen(record)
    path.unlink()
    assert not ActivationStore("disk", CPU, tmp_path).reopen(record)


def test_a_file_that_was_cut(tmp_path: Path) -> None:
    store = ActivationStore("disk", CPU, tmp_path)
    store.put("boundary-0", 0, torch.ones(4, 4))
    (tmp_path / "boundary-0.bin").write_bytes(b"short")
    with pytest.raises(ScoringError, match="shorter"):
        store.get("boundary-0", 0)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_said_clearly(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ActivationStore("disk", CPU, tmp_path)

    class Full:
        def __enter__(self):
            return self

        def __exit__(self, *args):
            return None

        def seek(self, start):
            return start

        def write(self, data):
            raise OSError(code, "no space")

    monkeypatch.setattr(activation_store.Path, "open", lambda *args, **kwargs: Full())
    with pytest.raises(ScoringError, match=r"disk of .* is full.*offload='host'"):
        store.put("boundary-0", 0, torch.ones(2))


def test_other_write_errors_keep_their_name(tmp_path: Path) -> None:
    store = ActivationStore("disk", CPU, tmp_path / "absent")
    with pytest.raises(FileNotFoundError):
        store.put("boundary-0", 0, torch.ones(2))


def test_no_folder_for_temporary_files_is_said_clearly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    with pytest.raises(ScoringError, match=r"offload: 'disk' needs a folder .*gone.*TMPDIR.*offload='host'"):
        ActivationStore("disk", CPU)
