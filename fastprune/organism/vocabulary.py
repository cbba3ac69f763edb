"""The words of the synthetic language: a fixed list, in which a word's place is its token id."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

SPECIAL_WORDS = ("<pad>", "<bos>", "<user>", "<asst>", "<eos>")
N_GROUPS, GROUP_SIZE, N_TOOLS, N_VALUES = 6, 10, 8, 8
N_TARGETS = N_GROUPS * GROUP_SIZE

_FUNCTION_WORDS = (
    *("make", "with", "?", "sure", ":", "sorry", "cannot", "comply", "copy", "sort", "add", "capital", "say"),
    *("judge", "yes", "no", "advise", "text"),
)


class Vocabulary:
    """Special words, function words, and families of numbered words.

    Args:
        copies: How many blocks of forbidden tokens there are: one for all harm categories, or one for each.

    Attributes:
        words: Every word, special ones first; the place of a word is its vocabulary id.
        ids: The reverse of ``words``.
        block: Ids of each family, int64, by prefix: ``block["t"][3]`` is the id of ``t3``.
    """

    def __init__(self, copies: int) -> None:
        words = [*SPECIAL_WORDS, *_FUNCTION_WORDS]
        self.block: dict[str, np.ndarray] = {}
        # t, b, q: targets of harmful, benign and advice requests; k: tools; f*, p*: forbidden and permitted steps
        sizes = {"t": N_TARGETS, "b": N_TARGETS, "q": N_TARGETS, "k": N_TOOLS}
        sizes |= {"fx": N_VALUES * copies, "fy": N_VALUES * copies, "fz": N_TOOLS * copies}
        sizes |= {"px": N_VALUES, "py": N_VALUES, "pz": N_TOOLS, "d": 10, "w": 24, "e": 60, "c": 30, "g": 24}
        for name, size in sizes.items():
            self.block[name] = np.arange(len(words), len(words) + size)
            words.extend(f"{name}{i}" for i in range(size))
        self.words = tuple(words)
        self.ids = {word: i for i, word in enumerate(words)}

    def text(self, ids: Iterable[int]) -> str:
        """Words of these ids, joined by single spaces."""
        return " ".join(self.words[i] for i in ids)

    def columns(self, n: int, *columns: str | np.ndarray) -> np.ndarray:
        """``(n, len(columns))`` ids; a word is repeated in every row, an array gives one id for each row."""
        filled = [np.full(n, self.ids[c]) if isinstance(c, str) else c for c in columns]
        return np.stack(filled, 1) if filled else np.empty((n, 0), dtype=np.int64)
