"""Calibration and evaluation rows of the organism, also as JSONL files such as a user starts from.

In: a language and a seed. Out: rows of :meth:`fastprune.organism.language.Language.rows`, or files of them.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from fastprune.errors import ArgumentError
from fastprune.files import replacing
from fastprune.organism.language import ALL_SKILLS, SKILLS, Language

N_HARM = 384
"""Calibration rows; 32 prune about as well, 8 do not."""
N_BENIGN_PER_SKILL = 16
N_EVAL_PER_SKILL = 96


def calibration_rows(language: Language, seed: int = 0) -> tuple[list[dict], list[dict]]:
    """``(harm, benign)``: 384 harmful rows of training pairs, and 96 benign rows, 16 of each utility skill.

    Recognition and refusals are left out of the benign set, so that their survival is a finding, not a constraint.
    """
    benign = [row for skill in SKILLS for row in language.rows(skill, N_BENIGN_PER_SKILL, seed=seed)]
    return language.rows("harm", N_HARM, seed=seed), benign


def evaluation_rows(language: Language, seed: int = 0) -> dict[str, list[dict]]:
    """Held-out rows by name.

    ``harm``: every held-out harmful pair once (120). ``skills``: every held-out pair of the neighbour skill (143), all
    60 facts, 96 rows of each other utility skill. ``recognition``: every held-out harmful request, each followed by
    its matched benign one (240).
    """
    skills = []
    for skill in SKILLS:
        n = None if skill in ("proc", "fact") else N_EVAL_PER_SKILL
        skills += language.rows(skill, n, seed=seed, split="test")
    return {
        "harm": language.rows("harm", seed=seed, split="test"),
        "skills": skills,
        "recognition": language.rows("judge", seed=seed, split="test"),
    }


def export_data(out_dir: str | os.PathLike, seed: int = 0, *, language: Language | None = None) -> dict[str, Path]:
    """Write calibration and evaluation rows as ``.jsonl`` files.

    ``harm``, ``benign``, ``eval_harm``, ``eval_skills``, ``eval_grammar`` and ``eval_recognition``. An exact match
    can judge all of them but ``eval_grammar``, the rows of ``gram``, which have many right replies.

    Args:
        out_dir: Made if needed; files of these names are replaced if they are of an earlier export.
        seed: Of the draws.
        language: None: the default language, which the shipped checkpoints speak.

    Returns:
        Name to path.

    Raises:
        ArgumentError: A file of such a name is not from an export; nothing is written.
    """
    language = language or Language()
    harm, benign = calibration_rows(language, seed)
    # The replies are whole, so that their end of turn is scored: a large share of replies as short as these.
    contents = {
        name: [{**row, "finish": "stop"} for row in rows] for name, rows in (("harm", harm), ("benign", benign))
    }
    held_out = evaluation_rows(language, seed)
    skills = held_out["skills"]
    held_out["skills"] = [row for row in skills if row["skill"] != "gram"]
    held_out["grammar"] = [row for row in skills if row["skill"] == "gram"]
    contents |= {f"eval_{name}": rows for name, rows in held_out.items()}
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    paths = {name: out_dir / f"{name}.jsonl" for name in contents}
    for path in paths.values():
        if path.exists() and not _is_exported(path):
            raise ArgumentError(
                f"expected a folder without {path.name}, or one of an earlier export, got {out_dir}, whose "
                f"{path.name} would be lost; name another folder",
                argument="out_dir",
            )
    for name, rows in contents.items():
        with replacing(paths[name]) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return paths


def _is_exported(path: Path) -> bool:
    """Whether the first row has an id of the language, such as ``harm-train-0-0``; an empty file counts as exported."""
    try:
        with path.open(encoding="utf-8") as lines:
            first = lines.readline()
        return not first or str(json.loads(first)["id"]).split("-")[0] in ALL_SKILLS
    except (OSError, ValueError, KeyError, TypeError):
        return False
