"""A Hugging Face tokenizer for the synthetic language: a token for each word, and a chat template.

In: a :class:`~fastprune.organism.language.Language`. Out: a fast tokenizer that can be saved, loaded by
``AutoTokenizer`` and used like that of any chat model. Ids are the language's vocabulary ids; ``<unk>`` follows them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastprune.organism.language import Language

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

UNKNOWN_WORD = "<unk>"
MAX_LENGTH = 64
"""Positions of the model, tokens; the longest document of the language has 26."""

# White space separates words and is otherwise dropped, so the template's own spaces are only for the reader.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %} <user> {{ message['content'] }}"
    "{% elif message['role'] == 'assistant' %} <asst> {{ message['content'] }} {{ eos_token }}"
    "{% else %}{{ raise_exception('the only roles are user and assistant') }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %} <asst> {% endif %}"
)


def build_tokenizer(language: Language) -> PreTrainedTokenizerFast:
    """A word-level tokenizer over ``language.words`` plus ``<unk>``.

    Tokenizing adds no special token. Special words in a text become their tokens, so that the output of the chat
    template can be tokenized. Decoding joins words by single spaces. Padding is on the left, for generation.
    """
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(WordLevel({**language.ids, UNKNOWN_WORD: len(language.words)}, unk_token=UNKNOWN_WORD))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token=UNKNOWN_WORD,
        additional_special_tokens=[AddedToken(word, special=True) for word in ("<user>", "<asst>")],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,  # it would glue "?" to the word before it
        padding_side="left",
        model_max_length=MAX_LENGTH,
    )
