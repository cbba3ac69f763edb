"""Chat templates: which are taken as they are, which with a note, and which would silently give another experiment.

The templates here are small ones with the behavior of those of the model families that they are named after.
"""

from __future__ import annotations

import json
import warnings
from datetime import datetime
from pathlib import Path

import pytest
from jinja2 import Environment
from support.chat_templates import (
    DEFAULT_SYSTEM,
    EMPTY,
    HARMONY,
    LLAMA2,
    LLAMA3,
    OFF,
    OFF_ONLY,
    OPEN,
    PLAIN,
    QWEN35,
    R1,
    SMOLLM3,
    chatml,
    template,
    tokenizer,
)
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from fastprune.calibration.chat_template import ChatTemplate
from fastprune.calibration.template_source import _DIRECTIVES, FROZEN_DATE
from fastprune.calibration.tokens import special_ids
from fastprune.errors import ArgumentError, CalibrationError, FastpruneWarning

CHECKPOINT = Path(__file__).parents[2] / "fastprune" / "organism" / "checkpoints" / "aligned"

# What is refused, with the words that name the kind and the arguments with which the model can be used.
REFUSED = {
    "qwen3": (chatml(EMPTY + "@", OFF_ONLY), "none of the thinking block", {"enable_thinking": False}),
    "qwen3.5": (QWEN35, "an open thinking block", {"enable_thinking": False}),
    "smollm3": (SMOLLM3, "one after which the model thinks first unless told otherwise", {"enable_thinking": False}),
    "a budget": (
        chatml(EMPTY + "@", "{% if thinking_budget == 0 %}" + EMPTY + "{% else %}" + OPEN + "{% endif %}"),
        "an open thinking block",
        {"thinking_budget": False},
    ),
    "qwen3 thinking": (chatml(EMPTY + "@", OPEN), "an open thinking block", None),
    "qwq, olmo3 think": (chatml("@", OPEN), "an open thinking block", None),
    "deepseek r1": (R1, "an open thinking block", None),
    "magistral spelling": (chatml("@", "[THINK]"), "an open thinking block", None),
    "kimi k2 thinking": (chatml("<think></think>@"), "none of the thinking block", None),
    "gpt-oss": (HARMONY, "only the first part", None),
    "command r7b": (template("@<|end|>", "<|start|>bot<|msg|>@<|end|>", "<|start|>bot"), "only the first part", None),
    "no generation prompt": (template("<|user|>@</s>", "<|assistant|>@</s>", ""), "no generation prompt", None),
}


def quiet(made: PreTrainedTokenizerFast, **arguments) -> ChatTemplate:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return ChatTemplate(made, **arguments)


@pytest.mark.parametrize("name", PLAIN)
def test_templates_whose_generation_prompt_ends_where_a_reply_begins_are_taken_in_silence(name):
    text, arguments = PLAIN[name]
    made = tokenizer(text)
    chat = quiet(made, template_args=arguments)
    asked, answered = {"role": "user", "content": "Hi *there*"}, {"role": "assistant", "content": "Hello"}
    frozen = {**arguments, "chat_template": chat._render.text, "tokenize": False}
    opening = made.apply_chat_template([asked], add_generation_prompt=True, **frozen)
    assert chat.opening("Hi *there*") == opening
    assert chat.opening("Hi *there*") + "Hello" + chat.closing == made.apply_chat_template([asked, answered], **frozen)


@pytest.mark.parametrize("name", REFUSED)
def test_another_experiment_is_refused_by_name_with_both_texts_and_a_way_out_that_works(name):
    text, kind, arguments = REFUSED[name]
    made = tokenizer(text)
    with pytest.raises(CalibrationError) as caught:
        ChatTemplate(made)
    message = str(caught.value)
    assert f"got {kind}" in message
    assert message.count("{prompt}") == 2 and message.count("{reply}") == 1
    if arguments is not None:
        assert f"Way out: pass template_args={arguments!r}" in message
        assert '{{ "" }}' not in message
        quiet(made, template_args=arguments)
        return
    begin, end = message.index("{% if add_generation_prompt"), message.index(" to the end of the last line of the chat")
    made.chat_template = text + message[begin:end]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FastpruneWarning)
        chat = ChatTemplate(made)
    assert made.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False).count("think") == 0
    assert not chat.opening("a").endswith(("<think>\n", "assistant"))


def test_a_way_out_is_only_named_if_it_works():
    """A variable that is only called like a switch is none; a tag that cannot be closed leaves no way."""
    made = tokenizer(SMOLLM3 + "{{ '' if think_words }}")
    with pytest.raises(CalibrationError, match=r"Way out: pass template_args=\{'enable_thinking': False\}") as caught:
        ChatTemplate(made)
    assert "think_words" not in str(caught.value)
    made = tokenizer(chatml("@", "<|START_THINKING|>{{ thinking_words }}"))
    with pytest.raises(CalibrationError, match=r"open thinking block.*Way out: set tokenizer.chat_template to another"):
        ChatTemplate(made)
    made = tokenizer(chatml("@", OPEN) + "{% set add_generation_prompt = false %}")
    with pytest.raises(CalibrationError, match=r"open thinking block.*Way out: set tokenizer.chat_template to another"):
        ChatTemplate(made)
    made = tokenizer(template("<|user|>@</s>", "<|assistant|>@</s>", "<|bot|>"))
    with pytest.raises(
        CalibrationError, match=r"another text than stands before.*Way out: set tokenizer.chat_template"
    ):
        ChatTemplate(made)


def test_the_last_line_of_a_template_file_may_end_in_a_line_break():
    text = template("<|user|>@</s>", "<|assistant|>@</s>", "") + "{{ '' }}\n"
    with pytest.raises(CalibrationError) as caught:
        ChatTemplate(tokenizer(text))
    assert 'add {% if add_generation_prompt %}{{ "<|assistant|>" }}{% endif %} to the end' in str(caught.value)


@pytest.mark.parametrize("name", ["qwen3", "smollm3"])
def test_thoughts_that_the_rows_hold_can_be_asked_for(name):
    text, _, _ = REFUSED[name]
    with pytest.raises(CalibrationError, match=r"or template_args=\{'enable_thinking': True\} for responses that hold"):
        ChatTemplate(tokenizer(text))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        chat = ChatTemplate(tokenizer(text), template_args={"enable_thinking": True})
    assert ["have to hold their thoughts" in str(warning.message) for warning in caught] == [True] * (name == "qwen3")
    assert chat.opening("a").endswith("<|start|>assistant\n")
    chat.check_text("<think>\nhm\n</think>\n\nb", "response", "row 0")


@pytest.mark.parametrize(
    ("text", "arguments", "note"),
    [
        # a finished conversation leaves the block out that the generation prompt ends: the documented use of many
        (chatml("@", EMPTY), {}, "an ended thinking block that a finished conversation does not show"),
        (chatml("@", "<|channel>thought\n<channel|>"), {}, "an ended thinking block"),  # gemma 4
        (chatml(EMPTY + "@", "<think></think>" + OFF), {"enable_thinking": True}, "an ended thinking block"),
        (LLAMA2, {}, "other white space at its end.*first token has it"),
        (template("USER: @ ", "ASSISTANT: @</s>", "ASSISTANT:"), {}, "other white space"),
        (chatml("{{ '\n' }}@"), {}, "other white space"),
        (chatml("@", "{{ '\n' }}"), {}, "other white space"),
    ],
)
def test_what_changes_no_more_than_the_border_is_noted(text, arguments, note):
    with pytest.warns(FastpruneWarning, match=note) as caught:
        ChatTemplate(tokenizer(text), template_args=arguments)
    assert len(caught) == 1
    assert caught[0].filename == __file__  # the note points at who made the template


def test_a_system_text_that_only_generation_sees_is_noted():
    """Mistral's templates put it before the last prompt, and only while that is the last turn."""
    system = "(messages[0].content ~ '\n\n' if loop.last and messages[0].role == 'system')"
    turn = f"{{{{ '[INST] ' ~ {system} ~ m.content ~ '[/INST]' }}}}"
    made = tokenizer(template(turn, "@</s>", "", before="<s>", system=""))
    quiet(made)
    with pytest.warns(FastpruneWarning, match="another text before the prompt than a finished.*Be brief.* and '<s>"):
        chat = ChatTemplate(made, system="Be brief.")
    assert chat.opening("a") == "<s>[INST] Be brief.\n\na[/INST]"


def test_white_space_that_changes_no_token_is_not_noted():
    """SentencePiece tokenizers begin a text with the space that the template of Llama 2 writes before a reply."""
    quiet(tokenizer(LLAMA2, words=True))


def test_an_option_that_only_sounds_like_thinking_is_no_choice_of_thoughts():
    made = tokenizer(chatml("<think></think>@", "{{ '' if reasoning_style is defined }}"))
    with pytest.raises(CalibrationError, match="none of the thinking block"):
        ChatTemplate(made, template_args={"reasoning_style": False})


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        ("", "drops it"),
        ("{{ 'hello' }}", "drops it"),
        ("{{ m.content[:30] }}", "cuts it"),
        ("{{ m.content|truncate(255) }}", "cuts it"),
        ("{{ m.content[-100:] }}", "cuts it"),
        ("{{ m.content.split('\n')[0] }}", "cuts it"),
        ("{{ m.content|lower }}", "changes its case"),
        ("{{ m.content|upper }}", "changes its case"),
        ("{{ m.content|title }}", "changes its case"),
        ("{{ m.content|e }}", "changes its text"),
        ("{{ m.content|replace('{', '') }}", "changes its text"),
        ("{{ m.content|striptags }}", "changes its text"),
        ("@ Again: @", "repeats it"),
    ],
)
def test_a_template_that_does_not_show_the_prompt_as_it_is_is_refused(content, kind):
    with pytest.raises(CalibrationError, match=f"shows the prompt once and as it is, got one that {kind}; it gives "):
        ChatTemplate(tokenizer(template(f"<|user|>{content}</s>", "<|assistant|>@</s>", "<|assistant|>")))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (chatml("@@"), "shows the reply once, got one that repeats it"),
        (
            "{% for m in messages|reverse %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>{% endif %}",
            "the prompt before the reply, got one that moves it behind",
        ),
        (chatml("{{ m.content|upper }}"), "does not show the assistant's content"),
        (template("@", "", ""), "does not show the assistant's content"),
        (template("{% for p in m.content %}{{ p.text }}{% endfor %}", "@", ""), "takes a list of parts"),
        (template("{{ m.content[0]['text'] }}", "@", ""), "takes a list of parts"),
        (template("{{ m.content[0].text + '' }}", "@", ""), "takes a list of parts"),
        (None, "format='chat' needs a chat template and this .* has none"),
        ({"rag": chatml(), "tools": chatml()}, r"one named 'default', got \['rag', 'tools'\]; set tokenizer"),
        ("{{ raise_exception('never') }}", "chat template failed .*never"),
        ("{% for %}", "chat template failed .*TemplateSyntaxError"),
        ("{{ messages|nothing }}", "chat template failed"),
        ("{{ 1 // 0 }}", "chat template failed .*ZeroDivisionError"),
    ],
)
def test_other_templates_that_cannot_be_used_are_refused_by_name(text, message):
    with pytest.raises(CalibrationError, match=message):
        ChatTemplate(tokenizer(text))


def test_of_several_templates_the_default_is_used():
    assert quiet(tokenizer({"rag": chatml(), "default": LLAMA3})).facts == quiet(tokenizer(LLAMA3)).facts


def test_a_tokenizer_is_needed():
    with pytest.raises(ArgumentError, match="tokenizer: expected a Hugging Face tokenizer, got str"):
        ChatTemplate("smollm2")


# --- one prompt at a time


def test_a_prompt_that_the_template_takes_for_an_instruction_is_refused_without_a_quote():
    """Some templates look for `/no_think` in the prompt, or fail on what it says."""
    switch = "{{ m.content.replace('/no_think', '') }}"
    ended = "{% if '/quiet' in messages[-1].content %}" + EMPTY + "{% endif %}"
    fails = "{{ raise_exception(m.content) if 'poem' in m.content }}"
    mode = "{{ 'b' if 'joke' in messages[-1].content else 'a' }}"  # no longer and no shorter
    text = chatml("@", ended, before=mode).replace("user\n{{ m.content }}", f"user\n{switch}{fails}")
    chat = quiet(tokenizer(text))
    assert chat.opening(" a\n\nb ").endswith("assistant\n")
    for prompt in ("secret /no_think", "secret /quiet", "secret poem", "secret joke"):
        with pytest.raises(CalibrationError) as caught:
            chat.opening(prompt)
        assert "secret" not in str(caught.value)


def test_white_space_around_a_prompt_and_empty_prompts_are_the_templates_affair():
    chat = quiet(tokenizer(PLAIN["gemma"][0]))
    assert chat.opening(" a\n") == chat.opening("a") == "<s><|start|>user\na<|end|>\n<|start|>model\n"
    assert chat.opening("") == "<s><|start|>user\n<|end|>\n<|start|>model\n"


# --- system texts


def test_a_system_text_stands_where_the_template_puts_it():
    assert quiet(tokenizer(chatml(before=DEFAULT_SYSTEM)), system="Be brief.").opening("a") == (
        "<|start|>system\nBe brief.<|end|>\n<|start|>user\na<|end|>\n<|start|>assistant\n"
    )
    folded = quiet(tokenizer(PLAIN["gemma3"][0]), system="Be brief.")
    assert folded.opening("a").startswith("<s><|start|>user\nBe brief.\n\na<|end|>")
    empty = quiet(tokenizer(chatml(before=DEFAULT_SYSTEM)), system="")
    assert empty.opening("a").startswith("<|start|>system\n<|end|>\n<|start|>user")
    assert empty.facts["system_sha256"] != folded.facts["system_sha256"] is not None
    assert len(folded.facts["system_sha256"]) == 64 and folded.facts["default_system"] is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (PLAIN["gemma"][0], "TemplateError: no system role"),
        (LLAMA2, "leaves the text out"),
        (chatml(system=""), "leaves the text out"),
        (chatml(system="{{ m.content|upper }}"), "leaves the text out"),
    ],
)
def test_a_system_text_that_the_template_does_not_show_is_refused_with_the_way_out(text, reason):
    for system in ("Be brief.", ""):
        with pytest.raises(ArgumentError, match=f"system: expected None .*{reason}.*beginning of each prompt"):
            ChatTemplate(tokenizer(text), system=system)


def test_system_is_plain_text():
    with pytest.raises(ArgumentError, match="system: expected text or None, got list"):
        ChatTemplate(tokenizer(chatml()), system=["a"])
    with pytest.raises(CalibrationError, match=r"system: expected text without control tokens, got '<\|end\|>'"):
        ChatTemplate(tokenizer(chatml()), system="a<|end|>")


def test_a_system_text_may_be_needed_and_may_switch_the_template():
    needed = "{{ raise_exception('no system') if messages[0].role != 'system' }}"
    quiet(tokenizer(chatml(before=needed)), system="a")
    with pytest.raises(CalibrationError, match=r"failed .*no system"):
        ChatTemplate(tokenizer(chatml(before=needed)))
    off = "{% if '/no_think' in messages[0].content %}" + EMPTY + "{% else %}" + OPEN + "{% endif %}"
    assert quiet(tokenizer(chatml(EMPTY + "@", off)), system="/no_think").opening("a").endswith("</think>\n\n")


def test_the_system_text_that_a_template_writes_by_itself_is_recorded():
    assert quiet(tokenizer(chatml(before=DEFAULT_SYSTEM))).facts["default_system"] == "Be good."
    for name in ("chatml", "llama3", "gemma", "gemma3", "mistral", "alpaca", "nothing but content"):
        assert quiet(tokenizer(PLAIN[name][0])).facts["default_system"] is None, name


# --- the clock, chance and arguments


@pytest.fixture
def another_day(monkeypatch):
    class Tomorrow(datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2031, 12, 1, 23, 59, 58, tzinfo=tz)

    monkeypatch.setattr(chat_template_utils, "datetime", Tomorrow)
    made = tokenizer(LLAMA3)
    turn = [{"role": "user", "content": "a"}]
    assert "01 Dec 2031" in made.apply_chat_template(turn, tokenize=False)  # the fake reaches the template


CLOCKS = {
    "{{ strftime_now('%d %b %Y') }}": "26 Jul 2024",
    '{{- strftime_now("%A, %-d %B %y, %H:%M:%S %% %j %p") -}}': "Friday, 26 July 24, 00:00:00 % 208 AM",
    "{% set today = strftime_now('%Y-%m-%d') %}{{ today }}": "2024-07-26",
    "{% macro day(form) %}{% set text = strftime_now(form) %}{{ text }}{% endmacro %}{{ day('%F') }}": "2024-07-26",
    "{% set clock = strftime_now %}{{ clock('%Y')|int + 1 }}": "2025",
    "{% if strftime_now is defined %}{{ strftime_now('%b') }}{% else %}never{% endif %}": "Jul",
    "{% for part in ['%d', '%m'] %}{{ strftime_now(part) }}/{% endfor %}": "26/07/",
    "{{ strftime_now('no directive') }}": "no directive",
}


@pytest.mark.parametrize("clock", CLOCKS)
def test_the_clock_stands_still_and_its_day_is_recorded(another_day, clock):
    chat = quiet(tokenizer(chatml(before=f"[{clock}]")))
    assert chat.opening("a").startswith(f"[{CLOCKS[clock]}]<|start|>user")
    assert chat.facts["date"] == FROZEN_DATE.isoformat() == "2024-07-26"


def test_freezing_the_clock_leaves_every_other_character_of_a_template(another_day):
    for begin in (
        "",
        "\n",
        "\n\n  ",
        "  {%- if true %}x{% endif %}",
        "{# note #}\n",
        "   {% if true %}\n y{% endif %}\n",
    ):
        plain = begin + chatml(before="Day: DAY\n") + "{{ '' }}\n"
        asks = tokenizer(plain.replace("DAY", "{{ strftime_now('%d') }}"))
        assert quiet(asks).opening("a") == quiet(tokenizer(plain.replace("DAY", "26"))).opening("a")


def test_every_directive_is_that_of_the_frozen_date():
    day = datetime(FROZEN_DATE.year, FROZEN_DATE.month, FROZEN_DATE.day)
    wrong = {key for key, value in _DIRECTIVES.items() if key != "s" and day.strftime(f"%{key}") != value}
    assert not wrong


def test_a_date_of_ones_own_is_used(another_day):
    chat = quiet(tokenizer(LLAMA3), template_args={"date_string": "1 May 2020"})
    assert "Today Date: 1 May 2020\n" in chat.opening("a")
    assert "Today Date: 26 Jul 2024\n" in quiet(tokenizer(LLAMA3)).opening("a")
    assert quiet(tokenizer(chatml())).facts["date"] is None


def test_no_other_clock_and_no_other_chance_reach_a_template():
    """What transformers adds to Jinja's own: a newer version with another clock is found out here."""
    given, own = chat_template_utils._compile_jinja_template("").environment, Environment()
    assert set(given.globals) - set(own.globals) == {"raise_exception", "strftime_now"}
    assert set(given.filters) == set(own.filters)
    assert set(own.globals) == {"range", "dict", "lipsum", "cycler", "joiner", "namespace"}


@pytest.mark.parametrize(
    "draw",
    [
        "{{ ['a', 'b']|random }}",
        "{% macro greet() %}{{ ['a']|random }}{% endmacro %}",
        "{% filter random %}a{% endfilter %}",
        "{{ [['a', 'b']]|map('random')|join }}",
        "{% set how = 'random' %}{{ [['a', 'b']]|map(how)|join }}",
        "{% if false %}{{ lipsum() }}{% endif %}",
        "{% set words = lipsum %}{{ words(n=1) }}",
        "{% set x = namespace(word=(messages|random).role) %}",
        "{% for m in messages if m.role == ['user', 'user']|random %}{% endfor %}",
    ],
)
def test_templates_that_draw_at_random_are_refused(draw):
    with pytest.raises(CalibrationError, match=r"draws at random \('(random|lipsum)'\)"):
        ChatTemplate(tokenizer(chatml(before=draw)))


def test_the_word_random_is_no_draw():
    quiet(
        tokenizer(chatml(before="{# |random #}{{ 'random' }}{% set lipsum = 'a' %}{{ lipsum }}{{ messages.random }}"))
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"enable_thinkin": False}, r"one of \['date', 'enable_thinking'\], got .*you mean 'enable_thinking'"),
        ({"zzz": 1}, "got 'zzz', which the chat template does not read; leave it out"),
        ({1: 1}, "got 1, which the chat template does not read"),
        ({"messages": []}, "got 'messages', which is set by"),
        ({"add_generation_prompt": True}, "which is set by"),
        ({"bos_token": "<b>"}, "which is set by"),
        ({"tools": []}, "which is set by"),
        ({"strftime_now": "2020"}, "which is set by"),
        ({"raise_exception": 1}, "which is set by"),
        ({"chat_template": "x"}, "which is set by"),
        ({"tokenize": True}, "which is set by"),
        ({"message": 1}, "which the chat template does not read"),  # its own loop variable
        ({"mine": 1}, "which the chat template does not read"),  # set by the template before it is read
        ({"date": {1, 2}}, r"template_args\['date'\]: expected a JSON value, got \{1, 2\}"),
        ({"date": float("nan")}, "expected a JSON value, got nan"),
        ({"enable_thinking": "False"}, "expected a JSON value, got the text 'False'; pass True, False or None"),
        (["enable_thinking"], "template_args: expected a mapping of names to values, got list"),
    ],
)  # fmt: skip
def test_arguments_that_the_template_does_not_read_are_refused(arguments, message):
    before = (
        "{{ bos_token }}{% set mine = 1 %}{{ mine }}{{ date }}{{ strftime_now('%d') }}"
        "{{ raise_exception('') if tools }}"
        "{% for message in messages %}{{ message.none }}{% endfor %}{{ '' if enable_thinking }}"
    )
    with pytest.raises(ArgumentError, match=message):
        ChatTemplate(tokenizer(chatml(before=before)), template_args=arguments)


def test_a_template_without_variables_says_so():
    with pytest.raises(ArgumentError, match="expected no name, since the chat template reads no variable, got 'a'"):
        ChatTemplate(tokenizer(chatml()), template_args={"a": 1})


def test_facts_are_json_and_tell_experiments_apart():
    text = chatml(before="{{ a }}{{ strftime_now('%d') }}")
    several = [
        quiet(tokenizer(text), template_args={"a": ("b", {"c": None})}),
        quiet(tokenizer(text), template_args={"a": 2}),
        quiet(tokenizer(text), template_args={"a": 2}, system="x"),
        quiet(tokenizer(text)),
        quiet(tokenizer(text + "{# #}")),
    ]
    facts = [json.dumps(chat.facts, sort_keys=True, allow_nan=False) for chat in several]
    assert len(set(facts)) == len(facts)
    assert several[0].facts["template_args"] == {"a": ["b", {"c": None}]}


# --- the end of the turn


@pytest.mark.parametrize(
    ("closing", "tokens"),
    [
        ("<|end|>\n", ["<|end|>"]),
        (" <|end|></s>", ["Ġ", "<|end|>"]),
        ("\n\n<|Asst|>", ["\n\n", "<|Asst|>"]),
        (".", ["."]),
        ("", []),
    ],
)
def test_the_end_of_turn_goes_up_to_the_first_special_token(closing, tokens):
    made = tokenizer(template("<|user|>@", f"{{{{ '<|assistant|>' ~ m.content ~ {closing!r} }}}}", "<|assistant|>"))
    chat = quiet(made)
    assert (chat.closing, made.convert_ids_to_tokens(chat.end_of_turn)) == (closing, tokens)
    assert chat.control_ids == special_ids(made)


# --- texts of rows


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("chatml", "a <|end|> b"),
        ("chatml", "<|start|>user\nb<|end|>"),
        ("chatml", "a</s>"),
        ("chatml", "<s>a"),
        ("chatml", "a<|other|>"),  # not the template's, but nothing that people write
        ("chatml", "<pad>a"),
        ("r1", "<|User|>b"),  # no token: the template's own words
        ("r1", "a <|Asst|>"),  # a token that was not called special
        ("zephyr, olmo2", "a <|assistant|>\n b"),
        ("mistral", "ignore [/INST] that"),
        ("mistral", "[INST] a"),
        ("alpaca", " ### Instruction:\na"),
        ("alpaca", "\n### Response:\na"),
        ("vicuna", "USER: a ASSISTANT: b"),
        ("vicuna", "A chat. USER: a"),
        ("vicuna", "ASSISTANT: b"),
        ("line breaks folded, as rwkv", "User: a"),
    ],
)
def test_rows_that_are_rendered_or_hold_control_tokens_are_refused_without_a_quote(name, text):
    own = {
        "r1": R1.replace(OPEN, ""),
        "vicuna": template("USER: @ ", "ASSISTANT: @</s>", "ASSISTANT: ", before="A chat. "),
    }
    chat = quiet(tokenizer(own.get(name) or PLAIN[name][0]))
    for what in ("prompt", "prefill", "response"):
        with pytest.raises(CalibrationError, match=rf"^f.csv, row 3: {what}: expected text .*format='raw'") as caught:
            chat.check_text(text + " secret", what, "f.csv, row 3")
        assert "secret" not in str(caught.value)


def test_any_token_that_the_template_writes_around_turns_is_a_control_token():
    """MiniMax and others have tokens of no common look, not all of them called special."""
    made = tokenizer(template("\u00a7user:@", "\u00a7bot:@\u00a7end", "\u00a7bot:"))
    made.add_tokens(["\u00a7user", "\u00a7end", "\u00a7tool"])
    chat = quiet(made)
    chat.check_text("a \u00a7tool \u00a73", "prompt", "row 0")
    for text in ("a \u00a7user", "a\u00a7end"):
        with pytest.raises(CalibrationError, match="expected text without control tokens"):
            chat.check_text(text, "prompt", "row 0")


def test_words_that_a_template_writes_around_turns_are_no_markers():
    made = tokenizer(template("User @\n", "Bot @\n", "Bot "))
    made.add_tokens(["Bot"])  # some tokenizers have added words
    chat = quiet(made)
    for text in ("Users of Bots", "User", "Bot"):
        chat.check_text(text, "prompt", "row 0")


@pytest.mark.parametrize("name", PLAIN)
def test_ordinary_texts_pass(name):
    text, arguments = PLAIN[name]
    chat = quiet(tokenizer(text), template_args=arguments)
    for ordinary in (
        "",
        "a < b, [x] | <y> <a href='b'> <p>USER</p> [INFO] [1]: \n\n",
        "cp <filename> <h1>head</h1> <tool_call> <unk> <mask>",
        "the user said: assistant, system, Users model an Instruction",
    ):
        for what in ("prompt", "prefill", "response"):
            chat.check_text(ordinary, what, "row 0")
    chat.check_text("what does <think> do?", "prompt", "row 0")
    chat.check_text("<think> is a tag", "prompt", "row 0")


def test_a_reply_may_hold_a_thought_unless_the_template_has_just_ended_one():
    thought = " <think>\nhm\n</think>\n\nb"
    quiet(tokenizer(chatml())).check_text(thought, "response", "row 0")
    chat = quiet(tokenizer(PLAIN["qwen3, no thinking"][0]), template_args={"enable_thinking": False})
    chat.check_text("b <think>", "response", "row 0")
    for what in ("response", "prefill"):
        with pytest.raises(CalibrationError, match=f"row 0: {what}: expected a reply without a thought"):
            chat.check_text(thought, what, "row 0")


def test_checking_a_row_tokenises_nothing():
    made = tokenizer(chatml())
    chat = quiet(made)
    calls = []
    made.__class__ = type("Counting", (type(made),), {"__call__": lambda self, *a, **k: calls.append(a)})
    chat.check_text("It is said that a < b, and so on. " * 40, "response", "row 0")
    assert not calls


def test_the_shipped_tokenizer_passes_without_a_note():
    made = AutoTokenizer.from_pretrained(CHECKPOINT)
    chat = quiet(made)
    turn = [{"role": "user", "content": "w1 w2"}]
    assert chat.opening("w1 w2") == made.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    assert chat.end_of_turn == [made.eos_token_id]


def test_the_tags_in_other_alphabets_are_known():
    tags = "◁think▷ ◁/think▷ <seed:think> </seed:think> <thought> </thought> <|begin_of_thought|> <|end_of_thought|>"
    names = tags.split()
    for opening, end in zip(names[::2], names[1::2], strict=True):
        with pytest.raises(CalibrationError, match="an open thinking block"):
            ChatTemplate(tokenizer(chatml("@", opening)))
        with pytest.warns(FastpruneWarning, match="an ended thinking block"):
            ChatTemplate(tokenizer(chatml("@", opening + end)))
