"""Turns before a prompt: what the chat format makes of them, and which templates and rows are refused."""

from __future__ import annotations

import warnings

import pytest
from support.chat_templates import EMPTY, OFF_ONLY, PLAIN, chatml, template, tokenizer
from support.real_model import FOLDER, is_made

from fastprune.calibration import Encoder, Row, load_calibration
from fastprune.calibration.chat_template import ChatTemplate
from fastprune.calibration.tokens import encode
from fastprune.checkpoint.load import load_tokenizer
from fastprune.errors import CalibrationError, FastpruneWarning
from fastprune.evaluation.generation import encode_contexts

MARK = "Zanzibar"  # in every text of a row, and in no message
EARLIER = (("user", f" {MARK} one\n"), ("assistant", f"{MARK}  two\n\n- three"))
SYSTEM = (("system", f"Be {MARK}."),)
LONG = (*SYSTEM, *EARLIER * 6)
NO_SYSTEM = {name for name, (text, _) in PLAIN.items() if "no system role" in text}
# As Mistral's templates do: the system text stands before the last prompt, and only while that is the last turn.
LAST = "(messages[0].content ~ '\n\n' if loop.last and messages[0].role == 'system')"
MISTRAL = template(f"{{{{ '[INST] ' ~ {LAST} ~ m.content ~ '[/INST]' }}}}", "@</s>", "", before="<s>", system="")


def quiet(text: str, **arguments) -> ChatTemplate:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return ChatTemplate(tokenizer(text), **arguments)


def rendered(chat: ChatTemplate, text: str, turns: list[tuple[str, str]], arguments: dict) -> str:
    messages = [{"role": role, "content": content} for role, content in turns]
    return tokenizer(text).apply_chat_template(
        messages, chat_template=chat._render.text, tokenize=False, add_generation_prompt=True, **arguments
    )


@pytest.mark.parametrize("history", [EARLIER, SYSTEM, LONG], ids=["earlier", "system", "long"])
@pytest.mark.parametrize("name", PLAIN)
def test_earlier_turns_are_rendered_as_the_template_does(name, history):
    text, arguments = PLAIN[name]
    chat = quiet(text, template_args=arguments)
    if history[0][0] == "system" and name in NO_SYSTEM:
        with pytest.raises(
            CalibrationError, match=r"row 7: history: .*write the system text at the beginning"
        ) as caught:
            chat.opening("And *now*?", history, "row 7")
        assert MARK not in str(caught.value)
        return
    expected = rendered(chat, text, [*history, ("user", "And *now*?")], arguments)
    assert chat.opening("And *now*?", history) == expected
    assert chat.opening("And *now*?") == rendered(chat, text, [("user", "And *now*?")], arguments)


LATER = "{%% if messages|length > 2 %%}%s{%% endif %%}"
REFUSED = {
    "one exchange only": (
        "{% if messages|length > 2 %}{{ raise_exception('one exchange') }}{% endif %}" + chatml(),
        "history: the tokenizer's chat template failed .*one exchange.*; leave out rows with earlier turns",
    ),
    "the last turn only": (
        "{% set ms = messages[-2:] if messages[-1].role == 'assistant' else messages[-1:] %}"
        + chatml().replace("in messages", "in ms"),
        "shows every earlier turn once and in order, got one that does not",
    ),
    "the last exchange only": (
        "{% set ms = messages[-4:] if messages[-1].role == 'assistant' else messages[-3:] %}"
        + chatml().replace("in messages", "in ms"),
        "shows every earlier turn once and in order",
    ),
    "a turn twice": (chatml(before="{{ messages[0].content if messages|length > 2 }}"), "once and in order"),
    "a summary of turns": (
        chatml(before="{% for m in messages[1:-2]|reverse %}{{ m.content }}{% endfor %}"),
        "once and in order",
    ),
    "another generation prompt": (
        chatml(prompt=LATER % "Then: "),
        "the same text around a reply after earlier turns as after a single prompt, .* got .*Then: ",
    ),
    "another end of turn": (
        template(
            "<|start|>user\n@<|end|>\n",
            "<|start|>assistant\n@{{ '</s>' if messages|length > 2 else '<|end|>' }}\n",
            "<|start|>assistant\n",
        ),
        "the same text around a reply after earlier turns as after a single prompt, .*got '</s>",
    ),
    "a thinking block in later turns": (chatml("@", LATER % EMPTY), "the same text around a reply after earlier turns"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_template_that_treats_later_turns_otherwise_is_refused_by_name(name):
    text, message = REFUSED[name]
    chat = quiet(text)
    with pytest.raises(CalibrationError, match=message) as caught:
        chat.opening("Hi", EARLIER * 2, "rows, row 3")
    assert str(caught.value).startswith("rows, row 3: history: ") and MARK not in str(caught.value)
    assert chat.opening("Hi")  # rows without earlier turns are not affected


def test_a_thought_that_the_template_takes_out_of_an_earlier_reply_is_refused():
    """Qwen3's template drops the thoughts of earlier replies: the model would be shown another conversation."""
    reply = (
        "{{ m.content.split('</think>')[-1].lstrip('\n') if not loop.last else '<think>\n\n</think>\n\n' ~ m.content }}"
    )
    chat = quiet(chatml(reply, OFF_ONLY), template_args={"enable_thinking": False})
    assert chat.opening("Hi", EARLIER).count(MARK) == 2
    thinking = (("user", MARK), ("assistant", f"<think>\n{MARK}\n</think>\n\n{MARK}"))
    with pytest.raises(CalibrationError, match=r"row 3: history: expected turns .* takes out \(a thought") as caught:
        chat.opening("Hi", thinking, "row 3")
    assert MARK not in str(caught.value)


@pytest.mark.parametrize("turn", [0, 1])
def test_a_turn_that_the_template_changes_is_refused_and_one_that_it_trims_is_not(turn):
    instructed = chatml().replace("{{ m.content }}", "{{ m.content|replace('/no_think', '') }}")
    told = [list(EARLIER[0]), list(EARLIER[1])]
    told[turn][1] += " /no_think"
    with pytest.raises(CalibrationError, match="takes for an instruction to itself; change that turn"):
        quiet(instructed).opening("Hi", tuple(map(tuple, told)))
    joined = chatml().replace("{{ m.content }}", "{{ m.content|replace(' ', '') }}")
    with pytest.raises(CalibrationError, match="shows the prompt once and as it is"):
        quiet(joined)
    earlier = chatml("{{ m.content if loop.last else m.content|replace(' ', '') }}")
    with pytest.raises(CalibrationError, match="changes by more than white space"):
        quiet(earlier).opening("Hi", EARLIER)
    answered = chatml(prompt="{{ 'No.' if '/no' in messages[-1].content }}")
    with pytest.raises(CalibrationError, match="takes for an instruction to itself"):
        quiet(answered).opening("Hi /no", EARLIER)
    trimmed = chatml().replace("{{ m.content }}", "{{ m.content|trim }}")
    assert f"user\n{MARK} one<" in quiet(trimmed).opening(" Hi ", EARLIER)


def test_a_system_text_that_moves_is_noted_once():
    chat = quiet(MISTRAL)
    with pytest.warns(
        FastpruneWarning, match="another text before a prompt with earlier turns or a system text"
    ) as caught:
        opening = chat.opening("Hi", (*SYSTEM, *EARLIER))
        chat.opening("Hi", LONG)
    assert len(caught) == 1
    assert opening == f"<s>[INST] {EARLIER[0][1]}[/INST]{EARLIER[1][1]}</s>[INST] {SYSTEM[0][1]}\n\nHi[/INST]"


def test_the_system_text_of_a_row_and_that_of_the_caller_exclude_each_other():
    chat = quiet(chatml(), system="Be brief.")
    with pytest.raises(CalibrationError, match=r"^row 2: history: expected no system turn beside system=, got one"):
        chat.opening("Hi", LONG, "row 2")
    assert chat.opening("Hi", EARLIER).startswith("<|start|>system\nBe brief.<|end|>\n<|start|>user\n ")
    shown = quiet(PLAIN["qwen2.5, smollm2"][0]).opening("Hi", SYSTEM)
    assert SYSTEM[0][1] in shown and "Be good." not in shown


@pytest.mark.parametrize(
    ("history", "message"),
    [
        ((("assistant", MARK),), "expected a user turn as turn 1"),
        ((("user", MARK),), "expected the turns before a prompt to end in a reply, got a user's"),
        ((*EARLIER, *SYSTEM), "expected a user turn as turn 3 .*got a system"),
        ((("tool", MARK),), "expected a user turn as turn 1"),
    ],
)
def test_turns_that_do_not_follow_each_other_are_refused(history, message):
    with pytest.raises(CalibrationError, match=f"row 1: history: {message}") as caught:
        quiet(chatml()).opening("Hi", history, "row 1")
    assert MARK not in str(caught.value)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_control_tokens_in_earlier_turns_are_refused(place):
    encoder = Encoder(tokenizer(chatml()), format="chat")
    history = [list(turn) for turn in (*SYSTEM, *EARLIER)]
    history[place][1] = f"{MARK}<|end|>"
    row = Row("Hi", "Ho", id="r", history=tuple(map(tuple, history)))
    with pytest.raises(
        CalibrationError, match=rf"\(id 'r'\): history, turn {place + 1}: expected text without"
    ) as caught:
        encoder.example(row)
    assert MARK not in str(caught.value)


def test_the_example_of_a_row_is_its_conversation_and_its_set_has_another_hash():
    made = tokenizer(chatml())
    row = Row("Hi", "Ho", "Well: ", history=EARLIER)
    encoder = Encoder(made, format="chat")
    example = encoder.example(row)
    chat = quiet(chatml())
    pieces = (chat.opening("Hi", EARLIER), "Well: ", "Ho", "<|end|>")
    opening, prefill, response, end = (encode(made, piece) for piece in pieces)
    assert encoder.context("Hi", "Well: ", history=EARLIER) == opening + prefill
    assert encode_contexts(encoder, [row]) == [opening + prefill]  # generation asks with the same turns
    assert list(example.input_ids) == opening + prefill + response + end
    assert [label for label in example.labels if label >= 0] == response + end
    alone, other = Row("Hi", "Ho", "Well: "), Row("Hi", "Ho", "Well: ", history=SYSTEM)
    sets = [load_calibration([each], made, format="chat").hash for each in (row, alone, other)]
    assert len(set(sets)) == 3
    assert load_calibration([alone.to_record()], made, format="chat").hash == sets[1]
    assert load_calibration([row.to_record()], made, format="chat").hash == sets[0]


@pytest.mark.parametrize("history", [EARLIER, SYSTEM])
def test_the_raw_format_has_no_way_to_join_turns(history):
    rows = [Row("Hi", "Ho"), Row("Hi", "Ho", id="r", history=history)]
    expected = r"^rows, row 1 \(id 'r'\): history: expected none with format='raw', .*; use format='chat'$"
    with pytest.raises(CalibrationError, match=expected):
        load_calibration(rows, tokenizer(None))
    with pytest.raises(CalibrationError, match="history: expected none"):
        Encoder(tokenizer(None)).context("Hi", history=history)


@pytest.mark.real
@pytest.mark.skipif(not is_made(), reason="python tests/support/real_model.py makes the model")
@pytest.mark.parametrize("history", [EARLIER, SYSTEM, LONG], ids=["earlier", "system", "long"])
def test_a_real_template_and_its_tokens(history):
    made = load_tokenizer(FOLDER)
    turns = [{"role": role, "content": text} for role, text in (*history, ("user", "And\nnow?"))]
    opening = made.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    ids = Encoder(made, format="chat").context("And\nnow?", "Well", history=history)
    assert ids == encode(made, opening) + encode(made, "Well")
