"""Text to token ids: how prompt, prefill and response become one example.

In: a tokenizer and a row. Out: ids and labels. The pieces are tokenised separately and verbatim and then joined, so
that the border between context and scored response is exact and the same ids serve scoring and generation. Special
tokens are never added here; in the chat format they are part of the template's text.
It must not know files, batches or models.
"""

from __future__ import annotations

from typing import Any

from fastprune.calibration.examples import UNSCORED, Example
from fastprune.calibration.rows import Row
from fastprune.errors import ArgumentError, CalibrationError

FORMATS = ("raw", "chat")

# Stands in for the assistant's content, to see what the template writes after it. Templates may trim content and split
# it at their own markers, so it is one plain word.
_SENTINEL = "FastpruneSentinelContent"


def encode_context(tokenizer: Any, prompt: str, prefill: str = "", *, format: str = "raw") -> list[int]:
    r"""Token ids of everything before the scored response.

    ``raw`` is ``tok(prompt + "\n") + tok(prefill)``; ``chat`` is the tokenizer's template around a single user turn
    with the assistant's turn opened, then ``tok(prefill)``.

    Args:
        tokenizer: A Hugging Face tokenizer.
        prompt: The request.
        prefill: Start of the reply that counts as context.
        format: ``"raw"`` or ``"chat"``.

    Returns:
        The ids, ready to be continued by generation.

    Raises:
        ArgumentError: ``format`` is neither, or ``tokenizer`` is not one.
        CalibrationError: ``chat`` without a usable template.
    """
    check_format(tokenizer, format)
    if format == "raw":
        opening = prompt + "\n"
    else:
        opening = _render(tokenizer, [{"role": "user", "content": prompt}], add_generation_prompt=True)
    return _tokens(tokenizer, opening) + _tokens(tokenizer, prefill)


def encode_row(tokenizer: Any, row: Row, format: str = "raw", *, where: str = "row") -> Example:
    """Tokenise one row; response tokens (and in ``chat`` the end-of-turn token) are scored, context is not.

    Args:
        tokenizer: A Hugging Face tokenizer.
        row: The row.
        format: ``"raw"`` or ``"chat"``.
        where: How messages call the row.

    Returns:
        The example, of whatever length: nothing is truncated.

    Raises:
        ArgumentError: As :func:`encode_context`.
        CalibrationError: The response is empty or gives no token that can be scored, or the template is unusable.
    """
    if row.id is not None:
        where = f"{where} (id {row.id!r})"
    context = encode_context(tokenizer, row.prompt, row.prefill, format=format)
    response = _tokens(tokenizer, row.response)
    if not response:
        what = "is empty" if not row.response else "gives no token"
        raise CalibrationError(f"{where}: response {what}; a row needs at least one token to score")
    labels = [UNSCORED] * len(context) + response
    if format == "chat":
        closing = end_of_turn(tokenizer)
        response += closing
        # what a template puts between reply and end of turn (a space, a line break) is its own, not the reply's
        labels += [UNSCORED] * len(closing[:-1]) + closing[-1:]
    labels[0] = UNSCORED
    if all(label == UNSCORED for label in labels):
        raise CalibrationError(f"{where}: the context gives no token and the response only one, which nothing precedes")
    return Example(tuple(context + response), tuple(labels), id=row.id, category=row.category)


def end_of_turn(tokenizer: Any) -> list[int]:
    """Tokens that the chat template writes after the assistant's content, up to and including the end of the turn.

    Found by rendering a conversation with a marker as the assistant's content: of what follows the marker, the first
    special token ends the turn, and what stands before it (often nothing, else a space or a line break) belongs to the
    template. A template without a special token there ends the turn with the first token that it writes. Not simply
    the tokenizer's ``eos_token``, which many instruction-tuned models do not end a turn with.

    Returns:
        The ids, of which the last one is the end-of-turn token; empty if the template writes nothing.

    Raises:
        CalibrationError: There is no template, or it does not show the assistant's content.
    """
    turns = [{"role": "user", "content": "user"}, {"role": "assistant", "content": _SENTINEL}]
    text = _render(tokenizer, turns, add_generation_prompt=False)
    _, found, suffix = text.rpartition(_SENTINEL)
    if not found:
        raise CalibrationError(
            "the chat template does not show the assistant's content, so its end of turn cannot be found"
        )
    ids, special = _tokens(tokenizer, suffix), special_ids(tokenizer)
    end = next((place for place, token in enumerate(ids) if token in special), 0)
    return ids[: end + 1]


def special_ids(tokenizer: Any) -> set[int]:
    """Ids of special and other added tokens that can end a turn: not white space, and not the unknown word.

    Some tokenizers hold their end of turn as a token that was added without being called special; others (Gemma's,
    GPT-NeoX's) have added runs of spaces and line breaks in the same way.
    """
    special = set(tokenizer.all_special_ids)
    special |= {token for text, token in tokenizer.get_added_vocab().items() if text.strip()}
    if tokenizer.unk_token_id != tokenizer.eos_token_id:  # GPT-2 has one token for both
        special.discard(tokenizer.unk_token_id)
    return special


def check_format(tokenizer: Any, format: str) -> None:
    """Raise ArgumentError unless the format is known and the tokenizer can be called."""
    if format not in FORMATS:
        raise ArgumentError(f"format must be one of {FORMATS}, got {format!r}")
    if not callable(tokenizer):
        raise ArgumentError(f"tokenizer must be a Hugging Face tokenizer, got {type(tokenizer).__name__}")


def _tokens(tokenizer: Any, text: str) -> list[int]:
    # verbose=False: the length of a row is this package's concern (max_length), not a warning of the tokenizer's
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) if text else []


def _render(tokenizer: Any, turns: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
    if getattr(tokenizer, "chat_template", None) is None:
        raise CalibrationError(
            f"format='chat' needs a chat template and this {type(tokenizer).__name__} has none; "
            "use format='raw' or set tokenizer.chat_template"
        )
    try:
        # as text: with tokenize=True the pieces could not be joined token by token
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=add_generation_prompt)
    except Exception as error:  # a template is a foreign program: whatever it raises is a fact about the data
        raise CalibrationError(f"the tokenizer's chat template failed ({type(error).__name__}: {error})") from error
