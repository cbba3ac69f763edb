"""Headers and indexes that are not what the format allows: refused before an offset of theirs is read or written."""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save, save_file
from support.architectures import HARM, build

import fastprune
from fastprune.calibration import CalibrationSet
from fastprune.checkpoint import shards
from fastprune.checkpoint.load import load_model
from fastprune.checkpoint.patch import patch_in_place
from fastprune.checkpoint.shards import INDEX, SINGLE, read_header, stored_tensors
from fastprune.errors import ArtifactError, FastpruneError, ModelError, NotFoundError

HEAD, NAME = "lm_head.weight", "model.layers.0.mlp.up_proj.weight"


def parts(content: bytes) -> tuple[dict, bytes]:
    """Header and data of a safetensors file."""
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def whole(header: dict | str, data: bytes, length: int | None = None) -> bytes:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


TENSORS = {
    "a": torch.ones(4, 4),
    "b": torch.ones(3, dtype=torch.bfloat16),
    "c": torch.ones(2, 2, dtype=torch.int8),
    "d": torch.ones(0),
}
CONTENT = save(TENSORS, {"format": "pt"})
HEADER, DATA = parts(CONTENT)
A = HEADER["a"]

DAMAGED: dict[str, bytes] = {
    "negative offsets": whole({"a": {**A, "data_offsets": [-8, 56]}}, DATA[:56]),
    "reversed offsets": whole({"a": {**A, "data_offsets": [64, 0]}}, DATA[:64]),
    "a gap before": whole({"a": {**A, "data_offsets": [8, 72]}}, DATA[:72]),
    "a gap after": whole({"a": A}, DATA[:72]),
    "an overlap": whole({"a": {**A, "data_offsets": [0, 64]}, "e": {**A, "data_offsets": [32, 96]}}, bytes(96)),
    "two at one place": whole({"a": {**A, "data_offsets": [0, 64]}, "e": {**A, "data_offsets": [0, 64]}}, bytes(64)),
    "too short": whole({"a": {**A, "data_offsets": [0, 60]}}, bytes(60)),
    "negative shape": whole({"a": {**A, "shape": [-4, -4], "data_offsets": [0, 64]}}, bytes(64)),
    "true as a size": whole({"a": {**A, "shape": [True, 16], "data_offsets": [0, 64]}}, bytes(64)),
    "a size with a point": whole({"a": {**A, "shape": [4.0, 4], "data_offsets": [0, 64]}}, bytes(64)),
    "too many numbers": whole({"a": {**A, "shape": [2**62, 2**62], "data_offsets": [0, 64]}}, bytes(64)),
    "no dtype": whole({"a": {"shape": [4, 4], "data_offsets": [0, 64]}}, bytes(64)),
    "another dtype": whole({"a": {**A, "dtype": "X9", "data_offsets": [0, 64]}}, bytes(64)),
    "a list as dtype": whole({"a": {**A, "dtype": ["F32"], "data_offsets": [0, 64]}}, bytes(64)),
    "a name twice": whole(f'{{"a": {json.dumps(A)}, "a": {json.dumps(A)}}}', DATA),
    "a list": whole("[]", b""),
    "deep": whole('{"a":' * 50_000 + "1" + "}" * 50_000, b""),
    "no UTF-8": struct.pack("<Q", 4) + b'{"\xff}',
    "UTF-16": struct.pack("<Q", 6) + "{}".encode("utf-16"),
    "facts that are no text": whole({"__metadata__": {"a": 1}}, b""),
    "a length of 2^64 - 1": whole(HEADER, DATA, 2**64 - 1),
    "a length beyond the format's": whole(HEADER, DATA, 100_000_001),
    "a length of 0": whole(HEADER, DATA, 0),
    "a byte": b"\x00",
    "nothing": b"",
}
assert not {name for name, content in DAMAGED.items() if content == CONTENT}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_header_is_refused(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / SINGLE
    file.write_bytes(content)
    with pytest.raises(ArtifactError, match="is truncated or no safetensors file"):
        read_header(file)
    mask = fastprune.PruneMask({"a": torch.arange(3)}, {"a": (4, 4)})
    for write in (patch_in_place, lambda folder, mask: fastprune.patch_checkpoint(folder, mask, folder.with_name("o"))):
        with pytest.raises(ArtifactError, match="is truncated or no safetensors file"):
            write(tmp_path, mask)
    assert file.read_bytes() == content and [path.name for path in tmp_path.iterdir()] == [SINGLE]


VALUES = [-1, 0, 1, 2, 4, 16, 64, 2**63, 2**64, 10**30, -(10**30), 1.0, True, None, "F32", "F8_E4M3", "X", "4"]
VALUES += [[], [1], [4, 4], [4, -4], [True, 16], [0, 64], [64, 0], [-8, 56], [8, 72], [2**63, 2**63], {}, [[4], 4]]


def mutated(draw: random.Random) -> bytes:
    """A file with some of its header changed: a value in it, or bytes."""
    if draw.random() < 0.5:
        header = json.loads(json.dumps(HEADER))
        entry = header[draw.choice([name for name in header if name != "__metadata__"])]
        match draw.randrange(4):
            case 0:
                entry[draw.choice(list(entry))] = draw.choice(VALUES)
            case 1:
                entry.pop(draw.choice(list(entry)))
            case 2:
                header[draw.choice(["__metadata__", "", "\0", "a", "x" * 100])] = entry
            case _:
                pair = entry[draw.choice(["shape", "data_offsets"])]
                pair[draw.randrange(len(pair))] = draw.choice(VALUES)
        return whole(header, DATA)
    content = bytearray(CONTENT)
    for _ in range(draw.randint(1, 3)):
        at, length = draw.randrange(len(content) - len(DATA)), draw.randint(0, 3)
        content[at : at + length] = draw.choices(b'{}[]:,"0123456789-eE.ntf\\u \x00\xff', k=draw.randint(0, 3))
    return bytes(content[: draw.randrange(len(content))] if draw.random() < 0.1 else content)


def test_what_is_accepted_is_what_the_formats_own_reader_accepts(tmp_path: Path) -> None:
    file, accepted = tmp_path / SINGLE, 0
    for seed in range(600):
        content = mutated(random.Random(seed))
        file.write_bytes(content)
        try:
            with safe_open(file, framework="pt") as opened:
                slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - no mapping
                expected = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
        except SafetensorError:
            expected = None
        try:
            found = read_header(file)
        except ArtifactError:
            assert expected is None or content.count(b'"a":') > 1, content  # a name that comes twice
            continue
        assert {name: (stored.dtype, stored.shape) for name, stored in found.items()} == expected, content
        size = len(content) - len(DATA)
        assert all(size <= stored.start <= len(content) for stored in found.values()), content
        accepted += 1
    assert 30 < accepted < 500


def test_the_offsets_of_every_type(tmp_path: Path) -> None:
    file = tmp_path / SINGLE
    file.write_bytes(CONTENT)
    for name, stored in read_header(file).items():
        first = HEADER[name]["data_offsets"][0]
        assert stored.start == len(CONTENT) - len(DATA) + first and stored.numel == TENSORS[name].numel()


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    build("Llama").save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder


def index_of(folder: Path) -> dict:
    return json.loads((folder / INDEX).read_text())


def put(folder: Path, shard: str, **tensors: torch.Tensor) -> None:
    save_file({**load_file(folder / shard), **tensors}, folder / shard, {"format": "pt"})


def refused(folder: Path, match: str, error: type = ArtifactError) -> None:
    """By everything that reads the folder, which stays as it was."""
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    mask = fastprune.PruneMask({NAME: torch.arange(3)}, {NAME: (48, 32)})
    calls: list[Callable[[], object]] = [
        lambda: stored_tensors(folder),
        lambda: fastprune.score(folder, CalibrationSet(HARM), progress=False),
        lambda: patch_in_place(folder, mask),
        lambda: fastprune.patch_checkpoint(folder, mask, folder.with_name("out")),
    ]
    for call in calls:
        with pytest.raises(error, match=match):
            call()
    with pytest.raises(FastpruneError, match=match):
        load_model(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert not folder.with_name("out").exists()


def test_a_weight_in_two_shards_is_refused(sharded: Path) -> None:
    """Guards a silent choice: the other copy was neither scored nor patched, and some loaders take that one."""
    where = index_of(sharded)["weight_map"]
    other = next(shard for shard in sorted(set(where.values())) if shard != where[NAME])
    put(sharded, other, **{NAME: torch.zeros(48, 32)})
    first, second = sorted([where[NAME], other])
    refused(sharded, rf"holds {NAME} in two shards, {first} and {second}.*save_pretrained")


def test_an_index_and_shards_that_do_not_agree(sharded: Path) -> None:
    index = index_of(sharded)
    where = index["weight_map"]
    other = next(shard for shard in sorted(set(where.values())) if shard != where[NAME])
    (sharded / INDEX).write_text(json.dumps({**index, "weight_map": {**where, NAME: other}}))
    refused(sharded, rf"{NAME} should be in {other} and is in {where[NAME]}")
    (sharded / INDEX).write_text(json.dumps({**index, "weight_map": {**where, "absent": other}}))
    refused(sharded, rf"absent should be in {other} and is in no shard")


def test_a_weight_that_the_index_leaves_out_counts_as_in_transformers(sharded: Path) -> None:
    expected = stored_tensors(sharded)
    index = index_of(sharded)
    del index["weight_map"][NAME]
    (sharded / INDEX).write_text(json.dumps(index))
    assert stored_tensors(sharded) == expected
    assert torch.equal(load_model(sharded).get_parameter(NAME), build("Llama").get_parameter(NAME))


BAD_INDEXES = {
    "list": "[]",
    "no map": "{}",
    "no shard": '{"weight_map": {}}',
    "map of lists": '{"weight_map": {"a": []}}',
    "a list as map": '{"weight_map": []}',
    "number": '{"weight_map": {"a": 3}}',
    "outside": '{"weight_map": {"a": "../x"}}',
    "absolute": '{"weight_map": {"a": "/etc/passwd"}}',
    "null character": '{"weight_map": {"a": "x\\u0000"}}',
    "half a character": '{"weight_map": {"a": "\\ud800"}}',
    "line break": '{"weight_map": {"a": "x\\ny"}}',
    "a key twice": '{"weight_map": {"a": "x", "a": "y"}}',
    "two maps": '{"weight_map": {"a": "x"}, "weight_map": {"a": "y"}}',
    "deep": '{"weight_map":' + '{"a":' * 100_000 + "1" + "}" * 100_001,
    "cut": '{"weight_map": {',
    "another file": '{"weight_map": {"a": "config.json"}}',
}


@pytest.mark.parametrize("text", BAD_INDEXES.values(), ids=BAD_INDEXES)
def test_an_index_that_is_none(text: str, sharded: Path) -> None:
    (sharded / INDEX).write_text(text)
    refused(sharded, "index|config.json is truncated or no safetensors file")


@pytest.mark.parametrize("name", ["", ".", "..", "x" * 5000])
def test_an_index_of_names_that_no_file_has(name: str, sharded: Path) -> None:
    (sharded / INDEX).write_text(json.dumps({"weight_map": {NAME: name}}))
    refused(sharded, "index", (ArtifactError, NotFoundError))


def test_an_index_of_a_gigabyte_is_not_parsed(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_INDEX_BYTES", 100)
    refused(sharded, "expected at most 100 bytes")


def test_an_index_left_beside_a_single_file_is_not_copied(sharded: Path, tmp_path: Path) -> None:
    """Other loaders would look for its shards, which are not in the copy."""
    build("Llama").save_pretrained(tmp_path / "single")
    shutil.copy(tmp_path / "single" / SINGLE, sharded)
    mask = fastprune.PruneMask({NAME: torch.arange(3)}, {NAME: (48, 32)})
    with pytest.warns(fastprune.errors.FastpruneWarning, match=INDEX):
        out = fastprune.patch_checkpoint(sharded, mask, tmp_path / "out")
    assert not (out / INDEX).exists() and (out / SINGLE).exists()


@pytest.mark.parametrize("dtype", ["F8_E4M3", "I64", "BOOL"])
def test_tensors_of_other_types_may_be_there_and_are_no_weights(dtype: str, tmp_path: Path) -> None:
    build("Llama").save_pretrained(tmp_path)
    kinds = {"F8_E4M3": torch.float8_e4m3fn, "I64": torch.int64, "BOOL": torch.bool}
    put(tmp_path, SINGLE, table=torch.ones(4).to(kinds[dtype]))
    assert stored_tensors(tmp_path)["table"].dtype == dtype
    expected = fastprune.score(build("Llama"), CalibrationSet(HARM), progress=False).select(None, 0.01)
    assert fastprune.score(tmp_path, CalibrationSet(HARM), progress=False).select(None, 0.01) == expected
    put(tmp_path, SINGLE, **{NAME: torch.ones(48, 32).to(kinds[dtype])})
    with pytest.raises((ArtifactError, ModelError), match=f"{dtype}|stored as"):
        fastprune.score(tmp_path, CalibrationSet(HARM), progress=False)
