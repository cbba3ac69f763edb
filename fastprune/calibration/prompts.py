"""Prompts as hashes: what it takes to find a prompt again, exactly or nearly, without keeping its text.

A prompt is what the user says: the prompt of a row, after the user's turns of its history. System texts and earlier
replies are left out: the same request under another system text is the same request, and a last turn such as "go on" is
not, in another conversation.

In: rows. Out: :class:`PromptHashes` of one prompt, :class:`PromptIndex` of many, and JSON data of an index for the
files of scores and masks. Hashes are the same on every machine. They are not salted: whoever has a prompt can recognize
it, which is what they are for.
"""

from __future__ import annotations

import base64
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import Any

import numpy as np

from fastprune.calibration.rows import Row
from fastprune.errors import CalibrationError

SCHEME = 1  # raised when the same prompt gets other hashes
GRAM = 5  # words
LEAST_WORDS = 8  # in shorter prompts two people may well choose the same five words
# 4-byte hashes of 5-grams that a file keeps, per prompt on average. Prompts of benchmarks of harm have 10 to 30 words,
# so that all of theirs are kept; 824 prompts take at most 130 kB.
KEPT = 24

_EVERY = 0xFFFFFFFF  # the highest hash of a 5-gram
_FACTORS = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 0xD6E8FEB86659FD93, 0xA0761D6478BD642F)
_MIX = 0xE7037ED1A0B428DB
_APOSTROPHES = {*"'\u2019\u2018\u02bc\u2032`\u00b4"}
# Scripts without spaces between words; each character counts as a word.
_UNSPACED = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x3040, 0x30FF),  # Hiragana, Katakana
    (0x3400, 0x9FFF),  # Han
    (0xF900, 0xFAFF),
    (0x20000, 0x3FFFF),
)


class _Folding(dict[int, str]):
    """What becomes of a character, for ``str.translate``; found out once for each."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        category = unicodedata.category(character)
        if character in _APOSTROPHES or category == "Cf":  # inside words: don't, soft hyphens, joiners
            folded = ""
        elif category[0] in "PZ" or category in ("Cc", "Sk"):
            folded = " "
        elif any(first <= code <= last for first, last in _UNSPACED):
            folded = f" {character} "
        else:
            folded = character
        self[code] = folded
        return folded


_FOLDING = _Folding()


@dataclass(frozen=True, eq=False)
class PromptHashes:
    """One prompt.

    Attributes:
        exact: Of its text.
        folded: Of its letters, digits and symbols, without case, punctuation and white space (NFKC).
        grams: Of its distinct 5-grams of words, uint32, ascending; none below 8 words.
    """

    exact: int
    folded: int
    grams: np.ndarray

    @classmethod
    def of(cls, row: Row) -> PromptHashes:
        """The hashes of a row's prompt."""
        turns = [text for role, text in row.history if role == "user"] + [row.prompt]
        words = _words("\n".join(turns))
        return cls(_hash("\0".join(turns)), _hash("".join(words)), _grams(words))


class PromptIndex:
    """Prompts by their hashes, in which those of another index are looked up.

    Args:
        exact: ``(n,)`` uint64.
        folded: ``(n,)`` uint64.
        sizes: ``(n,)`` int64, the number of distinct 5-grams of each prompt.
        kept: ``(n,)`` int64, how many of them are known: the lowest.
        grams: uint32, those of one prompt after those of the other, each ascending.
        names: Of the rows, if they are known.
    """

    def __init__(
        self,
        exact: np.ndarray,
        folded: np.ndarray,
        sizes: np.ndarray,
        kept: np.ndarray,
        grams: np.ndarray,
        names: Sequence[str | None] | None = None,
    ) -> None:
        self.exact, self.folded, self.sizes, self.kept, self.grams = exact, folded, sizes, kept, grams
        self.names = names
        self.starts = np.concatenate([[0], np.cumsum(kept)])
        # Up to this hash, the 5-grams of a prompt are known.
        self.known_to = np.full(len(exact), _EVERY, np.int64)
        cut = np.flatnonzero(kept < sizes)
        some = cut[kept[cut] > 0]
        self.known_to[cut] = -1
        self.known_to[some] = grams[self.starts[some + 1] - 1]

    @classmethod
    def of(cls, prompts: Iterable[PromptHashes], names: Sequence[str | None] | None = None) -> PromptIndex:
        """All that is known of these prompts."""
        prompts = list(prompts)
        sizes = np.array([len(prompt.grams) for prompt in prompts], np.int64)
        return cls(
            np.array([prompt.exact for prompt in prompts], np.uint64),
            np.array([prompt.folded for prompt in prompts], np.uint64),
            sizes,
            sizes,
            np.concatenate([np.empty(0, np.uint32), *(prompt.grams for prompt in prompts)]),
            names,
        )

    @classmethod
    def merged(cls, indices: Iterable[PromptIndex]) -> PromptIndex:
        """The prompts of several indices, each once."""
        parts = list(indices)
        exact, folded, sizes, kept, grams = (
            np.concatenate([getattr(part, name) for part in parts])
            for name in ("exact", "folded", "sizes", "kept", "grams")
        )
        return cls(exact, folded, sizes, kept, grams)._distinct()

    def __len__(self) -> int:
        return len(self.exact)

    def facts(self) -> dict[str, Any]:
        """JSON data for the files of scores and masks; the same for any order of the rows.

        Each prompt is there once. Of the hashes of 5-grams the lowest of each prompt are kept, as many as make
        :data:`KEPT` on average: all of them, unless most prompts are long.
        """
        index = self._distinct()
        fewest, most = 0, int(index.kept.max(initial=0))
        while fewest < most:  # the largest limit that the average allows
            limit = (fewest + most + 1) // 2
            fits = np.minimum(index.kept, limit).sum() <= KEPT * len(index)
            fewest, most = (limit, most) if fits else (fewest, limit - 1)
        kept = np.minimum(index.kept, fewest)
        within = np.arange(len(index.grams)) - np.repeat(index.starts[:-1], index.kept)
        return {
            "scheme": SCHEME,
            "exact": _text(index.exact, "<u8"),
            "folded": _text(index.folded, "<u8"),
            "sizes": _text(index.sizes, "<u4"),
            "kept": _text(kept, "<u4"),
            "grams": _text(index.grams[within < np.repeat(kept, index.kept)], "<u4"),
        }

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> PromptIndex | None:
        """The index behind :meth:`facts`; ``None`` if it has hashes of another scheme.

        Raises:
            CalibrationError: It is damaged.
        """
        if facts.get("scheme") != SCHEME:
            return None
        try:
            exact, folded = (_array(facts[name], "<u8").astype(np.uint64) for name in ("exact", "folded"))
            sizes, kept = (_array(facts[name], "<u4").astype(np.int64) for name in ("sizes", "kept"))
            grams = _array(facts["grams"], "<u4").astype(np.uint32)
        except (KeyError, TypeError, ValueError) as error:
            raise CalibrationError(f"expected hashes of prompts as scores and masks have them, got {error}") from error
        if not len(exact) == len(folded) == len(sizes) == len(kept) or kept.sum() != len(grams) or (kept > sizes).any():
            raise CalibrationError(
                "expected hashes of prompts as scores and masks have them, got parts that do not fit"
            )
        return cls(exact, folded, sizes, kept, grams)

    def _distinct(self) -> PromptIndex:
        """Each prompt once, in the order of the hashes; of two that were kept in part, the one with more."""
        order = np.lexsort((-self.kept, self.exact))
        chosen = order[np.unique(self.exact[order], return_index=True)[1]]
        kept = self.kept[chosen]
        within = np.arange(kept.sum()) - np.repeat(np.cumsum(kept) - kept, kept)
        grams = self.grams[np.repeat(self.starts[chosen], kept) + within]
        return PromptIndex(self.exact[chosen], self.folded[chosen], self.sizes[chosen], kept, grams)


def _words(text: str) -> list[str]:
    """Words without case and punctuation; of a text that has none, its signs."""
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return text.translate(_FOLDING).split() or text.split()


def _grams(words: Sequence[str]) -> np.ndarray:
    if len(words) < LEAST_WORDS:
        return np.empty(0, np.uint32)
    hashes = np.array([_word_hash(word) for word in words], np.uint64)
    count = len(words) - GRAM + 1
    # arithmetic modulo 2**64, which numpy's arrays do without a warning
    mixed = np.zeros(count, np.uint64)
    for place, factor in enumerate(_FACTORS):
        mixed += hashes[place : place + count] * np.uint64(factor)
    mixed = (mixed ^ (mixed >> np.uint64(32))) * np.uint64(_MIX)
    return np.unique((mixed >> np.uint64(32)).astype(np.uint32))


def _hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


_word_hash = lru_cache(1 << 16)(_hash)


def _text(values: np.ndarray, dtype: str) -> str:
    return base64.b64encode(values.astype(dtype).tobytes()).decode("ascii")


def _array(text: str, dtype: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text, validate=True), dtype)
