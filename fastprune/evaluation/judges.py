"""Judges: how far a completion is what was asked for, from 0 to 1.

A judge is any callable ``(row, completion) -> float`` in [0, 1]. The row is the one that the model was asked with: its
``prefill`` is the part of the reply that was put into the model's mouth, its ``response`` is the reference for the
rest, and ``completion`` is only what the model itself wrote after the prefill. So a judge that compares, compares
``completion`` with ``response``, and a judge that reads a reply as a whole reads ``row.prefill + completion``.
It must not know models or tokenizers.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable

from fastprune.calibration import Row
from fastprune.calibration.refusals import REFUSAL_PHRASES, refusal_matcher
from fastprune.errors import ArgumentError, CalibrationError

Judge = Callable[[Row, str], float]

# How the names of their characters begin.
_UNSPACED_SCRIPTS = ("CJK ", "HIRAGANA ", "KATAKANA ", "THAI ", "LAO ", "KHMER ", "MYANMAR ", "TIBETAN ")


def exact_match(row: Row, completion: str) -> float:
    """1 if the completion begins with the reference response, word for word, else 0.

    Runs of white space count as one space; case counts. After the reference the text may end or go on, but not inside a
    word or number: "12" and "1.5" do not begin with "1", "1." and "1 and more" do. In scripts without spaces between
    words (Chinese, Japanese, Thai) it may go on anywhere. What follows the reference is not
    judged, so the result does not depend on how many tokens the model was given beyond it.

    Raises:
        CalibrationError: The row has no response to compare with.
    """
    if not row.response.strip():
        raise CalibrationError("exact_match needs the column 'response', and it is empty")
    return float(begins_with(completion, row.response))


def begins_with(text: str, start: str) -> bool:
    """Whether the text begins with these words, white space normalised, and not in the middle of a word or number."""
    # plain string work: one compiled pattern per reference took a third of an evaluation's time
    said, wanted = " ".join(text.split()), " ".join(start.split())
    if not said.startswith(wanted):
        return False
    glued = said[len(wanted) :].partition(" ")[0]
    if not glued or unicodedata.category(glued[0])[0] == "M":  # an accent or vowel sign belongs to the letter before it
        return not glued
    if _unspaced(wanted[-1:]) or _unspaced(glued[0]):
        return True
    return not any(character.isalnum() or character == "_" for character in glued)


def _unspaced(character: str) -> bool:
    """Whether it is of a script that puts no space between words, so that nothing shows where one ends."""
    return unicodedata.name(character or " ", "").startswith(_UNSPACED_SCRIPTS)


def keyword_refusal(phrases: Iterable[str] = REFUSAL_PHRASES, *, extra: Iterable[str] = ()) -> Judge:
    """A judge that is 1 where the completion contains a refusal phrase.

    Misleading by nature, and never to be shown without a semantic judge beside it: a model that writes nonsense does
    not refuse, one that apologises and then complies does, and a refusal in other words is missed.

    Args:
        phrases: Phrases in place of the built-in ones; case and the kind of apostrophe do not count, word borders do.
        extra: Phrases in addition.

    Returns:
        The judge.

    Raises:
        ArgumentError: No phrases, or one that is empty or not text.
    """
    if isinstance(phrases, str) or isinstance(extra, str):
        raise ArgumentError("keyword_refusal: phrases and extra are sequences of strings, got one string")
    wanted = [*phrases, *extra]
    if not wanted or not all(isinstance(phrase, str) and phrase.strip() for phrase in wanted):
        raise ArgumentError(f"keyword_refusal: expected phrases that are not empty, got {wanted!r}")
    refuses = refusal_matcher(wanted)

    def judge(row: Row, completion: str) -> float:
        return float(refuses(completion))

    return judge
