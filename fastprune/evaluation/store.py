"""The folder in which answers are kept until judges have read them, and as long after as the user likes.

    store.json        version; model, tokenizer, template and masks that the answers are of
    rows.jsonl        every row once
    answers.jsonl     every answer once, by key
    judgements.jsonl  what judges said, by the answer's key

Answers may be harmful text: every file is for its owner alone (0600, temporary ones too), and a ``.gitignore`` keeps
the folder out of a repository. Lines are only appended, one write each, under a lock; a kill at any moment leaves whole
lines and perhaps a torn last one, which the next run cuts off.

In: rows and answers. Out: the same, and which keys are answered. It must not know how answers are made or judged.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastprune.errors import ArgumentError, ArtifactError, DiskError, NotFoundError
from fastprune.evaluation.answers import Answer, StoredRow, answer_of_line, row_of_line
from fastprune.files import JsonLines, check_space, private_replacing, read_json_lines, try_lock

VERSION = 1
_HEAD, _ROWS, _ANSWERS, _JUDGEMENTS = "store.json", "rows.jsonl", "answers.jsonl", "judgements.jsonl"
# What a line has besides its texts, and bytes of text that a token has at the most in ordinary languages.
_LINE_BYTES, _TOKEN_BYTES = 700, 8


class AnswerStore:
    """An open store; make one with :func:`open_store`.

    Attributes:
        folder: The folder.
        answers: The answers so far, by key.
        rows: The rows so far, by task and id.
    """

    def __init__(self, folder: Path, rows: JsonLines, answers: JsonLines) -> None:
        self.folder, self._row_lines, self._answer_lines = folder, rows, answers
        self.rows = {(row.task, row.id): row for row in _rows_of(rows.records, folder)}
        self.answers = {answer.key: answer for answer in _answers_of(answers.records, folder)}

    def add_rows(self, rows: Iterable[StoredRow]) -> None:
        """Add the rows that are not there yet.

        Raises:
            ArgumentError: A row of the same task and id, and of another content, is.
        """
        for row in rows:
            known = self.rows.setdefault((row.task, row.id), row)
            if known.content != row.content:
                raise ArgumentError(
                    f"expected one row with the id {row.id!r} among those of {row.task}, got another one than in "
                    f"{self.folder}; give ids that differ, or name another folder",
                    argument="store",
                )
            if known is row:
                self._row_lines.append(asdict(row))

    def add(self, answer: Answer) -> None:
        """Add an answer."""
        self._answer_lines.append(asdict(answer))
        self.answers[answer.key] = answer

    def check_room(self, answers: int, new_tokens: int) -> None:
        """Raise DiskError if the disk has no room for so many more answers of so many tokens in all."""
        check_space(self.folder, answers * _LINE_BYTES + new_tokens * _TOKEN_BYTES, f"store {self.folder}")


@contextlib.contextmanager
def open_store(folder: Path, facts: Mapping[str, Any], masks: Mapping[str, Mapping[str, Any]]) -> Iterator[AnswerStore]:
    """Open a store to add to it, or begin one.

    Args:
        folder: Made if it does not exist; its parent has to.
        facts: What all answers have in common, as JSON data: the model, the tokenizer, the encoding.
        masks: Facts of the masks that will be used, by name, with their ``digest``.

    Raises:
        ArgumentError: The store is in use, or of something else (says what differs), or a mask's name is taken by
            another mask, or the folder holds other things.
        ArtifactError: A file is damaged or of a later version.
        DiskError: Nothing can be written there.
    """
    with _locked(folder):
        head = _read_head(folder) if (folder / _HEAD).exists() else _begin(folder)
        if head.get("facts"):
            _check_facts(folder, head["facts"], facts)
        known = head.get("masks", {})
        _check_names(folder, known, masks)
        updated = {
            "version": VERSION,
            "facts": dict(facts),
            "masks": {**known, **masks},
            "begun_with": head.get("begun_with") or _versions(),
        }
        if updated != head:
            with private_replacing(folder / _HEAD) as temporary:
                temporary.write_text(json.dumps(updated, indent=1))
        with JsonLines(folder / _ROWS, "store") as rows, JsonLines(folder / _ANSWERS, "store") as answers:
            yield AnswerStore(folder, rows, answers)


def read_store(folder: Path) -> tuple[list[StoredRow], list[Answer]]:
    """Rows and answers of a store, which another process may be adding to.

    Raises:
        NotFoundError: There is no such folder.
        ArtifactError: It is no store, of a later version, or damaged.
    """
    if not folder.is_dir():
        raise NotFoundError(f"expected the folder of a store, found none at {folder}", argument="store")
    _read_head(folder)
    answers = _answers_of(_lines(folder / _ANSWERS), folder)  # first: their rows were there before them
    return _rows_of(_lines(folder / _ROWS), folder), answers


def forget_texts(folder: Path) -> tuple[int, int]:
    """Drop the texts of the answers that have been judged, and of the rows all of whose answers have.

    Keys, numbers and hashes stay, so that a rerun neither answers nor judges again.

    Args:
        folder: A store.

    Returns:
        Number of answers without text, and of those that keep theirs because no judge has read them.

    Raises:
        ArgumentError: The store is in use.
        NotFoundError, ArtifactError: As :func:`read_store`.
    """
    read_store(folder)  # a folder that is none is refused before it is made or locked
    with _locked(folder):
        rows, answers = read_store(folder)
        judged = {line.get("answer_key") for line in _lines(folder / _JUDGEMENTS)}
        kept = [answer for answer in answers if answer.key not in judged]
        needed = {(answer.task, answer.row) for answer in kept}
        _rewrite(folder / _ANSWERS, [a.without_texts() if a.key in judged else asdict(a) for a in answers])
        _rewrite(folder / _ROWS, [asdict(r) if (r.task, r.id) in needed else r.without_texts() for r in rows])
    return len(answers) - len(kept), len(kept)


def _lines(path: Path) -> list[dict[str, Any]]:
    return read_json_lines(path) if path.exists() else []  # killed before the file was made


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("fastprune", "torch", "transformers", "tokenizers")}


def _rewrite(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    with private_replacing(path) as temporary:
        temporary.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    try:
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise DiskError(
            f"expected a folder that can be written to, got {folder} ({error})", argument="store"
        ) from error
    try:
        if not try_lock(handle):
            raise ArgumentError(
                f"expected a store that nobody else is writing to, got {folder}, which another process is writing to "
                "now; wait for its end, or name another",
                argument="store",
            )
        yield
    finally:
        os.close(handle)


def _begin(folder: Path) -> dict[str, Any]:
    """Make a store of an empty folder."""
    found = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    if found:
        raise ArgumentError(
            f"expected a store, or an empty folder for one, got {folder}, which holds {found[0]} and no {_HEAD}; name "
            "another folder",
            argument="store",
        )
    with private_replacing(folder / ".gitignore") as temporary:
        temporary.write_text("*\n")
    return {}


def _read_head(folder: Path) -> dict[str, Any]:
    path = folder / _HEAD
    try:
        head = json.loads(path.read_bytes())
        version = head["version"]
    except FileNotFoundError:
        raise ArtifactError(f"{folder}: expected a store of answers, got a folder without {_HEAD}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path}: expected the head of a store, got something else ({error!r})") from error
    if version != VERSION:
        raise ArtifactError(
            f"{path}: expected a store of version {VERSION}, got {version}; use the fastprune that wrote it"
        )
    return head


def _check_facts(folder: Path, known: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    given = json.loads(json.dumps(facts))
    for name in {**known, **given}:
        if known.get(name) != given.get(name):
            raise ArgumentError(
                f"expected a store of the same {name}, got {folder}, whose answers are of another one "
                f"({_differing(known.get(name), given.get(name))}); name another folder",
                argument="store",
            )


def _check_names(folder: Path, known: Mapping[str, Mapping[str, Any]], masks: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse one name for two masks, and two names for one: answers are told apart by the names."""
    names = {mask["digest"]: name for name, mask in known.items()}
    for name, mask in masks.items():
        if name in known and known[name]["digest"] != mask["digest"]:
            raise ArgumentError(
                f"expected the mask that {folder} calls {name!r}, got another one of that name; rename its file, or "
                "name another folder",
                argument="masks",
            )
        if names.setdefault(mask["digest"], name) != name:
            raise ArgumentError(
                f"expected masks that differ, got {name!r}, which has the weights of {names[mask['digest']]!r}; leave "
                "it out, or name another folder",
                argument="masks",
            )


def _differing(known: Any, given: Any) -> str:
    """The first value that differs, as text."""
    if isinstance(known, dict) and isinstance(given, dict):
        for name in {**known, **given}:
            if known.get(name) != given.get(name):
                return f"{name}: {_differing(known.get(name), given.get(name))}"
    return f"{_short(known)} in the store, {_short(given)} now"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:20]}…"


def _rows_of(lines: Iterable[Mapping[str, Any]], folder: Path) -> list[StoredRow]:
    return [row_of_line(line, f"{folder / _ROWS}, line {number}") for number, line in enumerate(lines, start=1)]


def _answers_of(lines: Iterable[Mapping[str, Any]], folder: Path) -> list[Answer]:
    return [answer_of_line(line, f"{folder / _ANSWERS}, line {number}") for number, line in enumerate(lines, start=1)]
