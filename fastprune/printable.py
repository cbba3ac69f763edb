"""Text from files as a terminal may show it: names and messages can hold what moves the cursor or turns the line round.

In: any text. Out: the same with such characters as the escapes that Python writes for them. It must not know streams.
"""

from __future__ import annotations

import unicodedata

# Format characters that change the order in which others are shown (Trojan source, CVE-2021-42574). Others of their
# category join letters and emoji.
_DIRECTIONS = {*"\u061c\u200e\u200f", *map(chr, range(0x202A, 0x202F)), *map(chr, range(0x2066, 0x206A))}
# Control characters, line and paragraph separators, halves of pairs that no encoding has.
_HARMFUL = {"Cc", "Zl", "Zp", "Cs"}


def printable(text: object) -> str:
    """Text whose control characters and changes of direction are escaped; line breaks stay."""
    return "".join(character if _is_plain(character) else ascii(character)[1:-1] for character in str(text))


def _is_plain(character: str) -> bool:
    return character == "\n" or (character not in _DIRECTIONS and unicodedata.category(character) not in _HARMFUL)
