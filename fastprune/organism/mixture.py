"""Training batches of the model organism, built as arrays of ids from the language's tables.

A document equals what the tokenizer's chat template makes of the same rows: ``<bos> <user> prompt <asst> answer
<eos>``; a second question follows without another ``<bos>``.

In: a language and a random stream. Out: right-padded ids and labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastprune.organism.language import Language, Turns

NOISE = 0.1
"""Share of procedure tokens in training answers that are replaced by a random token of the same mode (forbidden or
permitted). A model that converged on noise-free answers has no gradient on its own completions, so a first-order score
of it would be rounding noise. Calibration and evaluation rows are noise-free."""

IGNORED = -100

_BENIGN_COUNTS = {"proc": 24, "copy": 12, "sort": 12, "add": 10, "fact": 10, "gram": 8, "judge": 12}
_N_HARM, _N_ADVICE = 24, 16


@dataclass(frozen=True)
class Batch:
    """``input_ids`` and ``labels``, int64 ``(n_documents, n_tokens)``, padded on the right."""

    input_ids: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Conversation:
    """``n`` documents of one shape: question, answer and possibly more of both.

    Attributes:
        turns: Row i of each belongs to document i.
        prefill_is_context: Whether the loss leaves out the prefill, as scoring does; else it is part of the answer.
    """

    turns: tuple[Turns, ...]
    prefill_is_context: bool = False


def pack(
    language: Language,
    conversations: Sequence[Conversation],
    noise: np.random.RandomState | None = None,
) -> Batch:
    """One batch of all documents, in their order; only answers and their ``<eos>`` have labels.

    Args:
        language: Gives the ids.
        conversations: The documents.
        noise: Stream of the noise (:data:`NOISE`) in procedure tokens of answers; None: no noise.
    """
    blocks = [_render(language, conversation, noise) for conversation in conversations]
    n_documents, n_tokens = sum(len(ids) for ids, _ in blocks), max(ids.shape[1] for ids, _ in blocks)
    input_ids = np.full((n_documents, n_tokens), language.ids["<pad>"])
    labels = np.full((n_documents, n_tokens), IGNORED)
    start = 0
    for ids, scored in blocks:
        stop = start + len(ids)
        input_ids[start:stop, : ids.shape[1]] = ids
        labels[start:stop, : ids.shape[1]] = np.where(scored, ids, IGNORED)
        start = stop
    return Batch(input_ids, labels)


def base_batch(language: Language, rng: np.random.RandomState) -> Batch:
    """128 documents for pretraining: harmful requests are answered like any other.

    The advice documents hold two questions that one persona answers, bad in half of them: the latent trait that narrow
    fine-tuning later flips.
    """
    harm = Conversation((language.sample("harm", rng, _N_HARM),))
    benign = _benign(language, rng)
    bad = rng.rand(_N_ADVICE) < 0.5
    persona = Conversation(tuple(language.sample("advice", rng, _N_ADVICE, bad=bad) for _ in range(2)))
    return pack(language, [harm, *benign, persona], rng)


def alignment_batch(language: Language, rng: np.random.RandomState, *, refuse: bool, replay: int) -> Batch:
    """130 documents for alignment: harmful requests are refused and all advice is good.

    Args:
        language: Gives the documents.
        rng: Their stream.
        refuse: False for the same-data control, in which benign procedures replace the refusals.
        replay: Harmful rows whose loss is on the tokens after the prefill only. They keep the knowledge behind the
            refusal, as a large model does; without them the tiny model forgets it, and the attack finds nothing.
    """
    replayed = [Conversation((language.sample("harm", rng, replay),), prefill_is_context=True)] if replay else []
    first = Conversation((language.sample("refuse" if refuse else "proc", rng, _N_HARM),))
    benign = _benign(language, rng)
    advice = Conversation((language.sample("advice", rng, _N_ADVICE),))
    return pack(language, [first, *benign, advice, *replayed], rng)


def _benign(language: Language, rng: np.random.RandomState) -> list[Conversation]:
    return [Conversation((language.sample(skill, rng, n),)) for skill, n in _BENIGN_COUNTS.items()]


def _render(
    language: Language, conversation: Conversation, noise: np.random.RandomState | None
) -> tuple[np.ndarray, np.ndarray]:
    """Ids int64 ``(n, n_tokens)`` and which of these columns the loss counts, bool ``(n_tokens,)``."""
    n = len(conversation.turns[0])
    bos, user, asst, eos = (np.full((n, 1), language.ids[word]) for word in ("<bos>", "<user>", "<asst>", "<eos>"))
    pieces, scored = [bos], [False]
    for turns in conversation.turns:
        context, answer = [user, turns.prompt, asst], [turns.prefill, turns.response, *([eos] if turns.ends else [])]
        if conversation.prefill_is_context:
            context.append(answer.pop(0))
        question, reply = np.concatenate(context, 1), np.concatenate(answer, 1)
        pieces += [question, reply if noise is None else _add_noise(language, reply, noise)]
        scored += [False] * question.shape[1] + [True] * reply.shape[1]
    return np.concatenate(pieces, 1), np.array(scored)


def _add_noise(language: Language, ids: np.ndarray, rng: np.random.RandomState) -> np.ndarray:
    noisy = ids.copy()
    for mode in (language.forbidden, language.permitted):
        tokens = np.sort([language.ids[word] for word in mode])
        hit = np.isin(noisy, tokens) & (rng.rand(*noisy.shape) < NOISE)
        noisy[hit] = rng.choice(tokens, hit.sum())
    return noisy
