"""Small chat templates with the behavior of those of model families, and a tokenizer to put them on."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<s>", "</s>", "<unk>", "<pad>", "<|start|>", "<|end|>", "<|msg|>", "<|other|>", "<mask>", "<filename>"]
ADDED = ["<think>", "</think>", "<h1>", "<tool_call>", "<|Asst|>", "\n\n"]


def tokenizer(template: str | dict | None, *, words: bool = False) -> PreTrainedTokenizerFast:
    """A byte is a token; with ``words`` a word is one (unknown), and white space is none."""
    if words:
        backend = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    else:
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        backend = Tokenizer(models.BPE({letter: place for place, letter in enumerate(letters)}, []))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )
    made.add_tokens([AddedToken(token, special=True) for token in SPECIAL])
    made.add_tokens(ADDED)
    made.chat_template = template
    return made


def template(user: str, assistant: str, prompt: str, *, before: str = "", system: str | None = None) -> str:
    """A template from what it writes for each role; ``@`` is the content, and no ``system`` refuses such a turn."""
    system = "{{ raise_exception('no system role') }}" if system is None else system
    roles = (
        f"{{% if m.role == 'system' %}}{system}{{% elif m.role == 'user' %}}{user}{{% else %}}{assistant}{{% endif %}}"
    )
    text = (
        f"{before}{{% for m in messages %}}{roles}{{% endfor %}}{{% if add_generation_prompt %}}{prompt}{{% endif %}}"
    )
    return text.replace("@", "{{ m.content }}")


def chatml(reply: str = "@", prompt: str = "", **others: str) -> str:
    """Turns as ChatML has them, with something of one's own where a reply begins."""
    turn = "<|start|>%s\n%s<|end|>\n"
    others = {"system": turn % ("system", "@")} | others
    assistant = turn.replace("\n%s", "%s") % ("assistant", f"\n{reply}")
    return template(turn % ("user", "@"), assistant, f"<|start|>assistant\n{prompt}", **others)


EMPTY = "{{ '<think>\\n\\n</think>\\n\\n' }}"
OPEN = "{{ '<think>\\n' }}"
DEFAULT_SYSTEM = "{% if messages[0].role != 'system' %}<|start|>system\nBe good.<|end|>\n{% endif %}"
OFF_ONLY = "{% if enable_thinking is defined and enable_thinking is false %}" + EMPTY + "{% endif %}"
OFF = "{% if not enable_thinking|default(true) %}" + EMPTY + "{% endif %}"
LLAMA2 = template(
    "{{ '[INST] ' ~ m.content ~ ' [/INST]' }}", "{{ ' ' ~ m.content|trim ~ ' </s>' }}", "", before="<s>", system=""
)
HARMONY = template(
    "<|start|>user<|msg|>@<|end|>",
    "<|start|>assistant<|other|>final<|msg|>@{{ '</s>' if loop.last and not add_generation_prompt else '<|end|>' }}",
    "<|start|>assistant",
    before="{% macro head() %}{% if reasoning_effort is not defined %}{% set reasoning_effort = 'medium' %}{% endif %}"
    "{{ 'Date: ' + strftime_now('%Y-%m-%d') + ', reasoning: ' + reasoning_effort }}{% endmacro %}"
    "<|start|>system<|msg|>{{ head() }}<|end|>",
    system="<|start|>developer<|msg|>@<|end|>",
)
LLAMA3 = template(
    "<|start|>user<|other|>\n\n{{ m.content|trim }}<|end|>",
    "<|start|>assistant<|other|>\n\n{{ m.content|trim }}<|end|>",
    "<|start|>assistant<|other|>\n\n",
    before="<s>{% if not date_string is defined %}"
    "{% if strftime_now is defined %}{% set date_string = strftime_now('%d %b %Y') %}"
    "{% else %}{% set date_string = '26 Jul 2024' %}{% endif %}{% endif %}"
    "<|start|>system<|other|>\n\nToday Date: {{ date_string }}\n\n"
    "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}<|end|>",
    system="",
)
SMOLLM3 = chatml(
    OFF + "@", OFF, before="{% if not enable_thinking is defined %}{% set enable_thinking = true %}{% endif %}"
)
R1 = template(
    "<|User|>@", "<|Asst|>{{ m.content.split('</think>')[-1] }}</s>", "<|Asst|>" + OPEN, before="<s>", system="@"
)

QWEN35 = chatml(
    EMPTY + "@",
    "{% if enable_thinking is defined and not enable_thinking %}" + EMPTY + "{% else %}<think>\n{% endif %}",
)
GEMMA3 = (
    "<s>{% set first, ms = '', messages %}{% if messages[0].role == 'system' %}"
    "{% set first, ms = messages[0].content ~ '\n\n', messages[1:] %}{% endif %}"
    "{% for m in ms %}<|start|>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ first if loop.first }}{{ m.content|trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>model\n{% endif %}"
)
TRIMMED = "<|start|>%s\n{{ m.content|trim }}<|end|>\n"

# Templates that are taken without a word: no thoughts, or told not to have them.
PLAIN = {
    "chatml": (chatml(), {}),
    "qwen2.5, smollm2": (chatml(before=DEFAULT_SYSTEM), {}),
    "qwen3, no thinking": (chatml(EMPTY + "@", OFF_ONLY), {"enable_thinking": False}),
    "qwen3.5, no thinking": (QWEN35, {"enable_thinking": False}),
    "smollm3, no thinking": (SMOLLM3, {"enable_thinking": False}),
    "deepseek v3.1": (
        template("<|User|>@", "<|Asst|></think>@</s>", "<|Asst|>{{ '<think>' if thinking else '</think>' }}"),
        {},
    ),
    "granite": (chatml(before="{% if thinking %}Think.{% endif %}", system="@"), {}),
    "llama3": (LLAMA3, {}),
    "gemma": (template(TRIMMED % "user", TRIMMED % "model", "<|start|>model\n", before="<s>"), {}),
    "gemma3": (GEMMA3, {}),
    "mistral": (template("[INST] @ [/INST]", "@</s>", "", before="<s>"), {}),
    "nemo": (template("[INST]@[/INST]", "@</s>", "", before="<s>"), {}),
    "phi3": (template("<|user|>\n@<|end|>\n", "<|assistant|>\n@<|end|>\n", "<|assistant|>\n", system="@"), {}),
    "zephyr, olmo2": (template("<|user|>\n@</s>\n", "<|assistant|>\n@</s>\n", "<|assistant|>\n", system="@"), {}),
    "command-r": (template("<|start|><|msg|>@<|end|>", "<|start|><|other|>@<|end|>", "<|start|><|other|>"), {}),
    "alpaca": (template("### Instruction:\n@\n\n", "### Response:\n@</s>", "### Response:\n", system="@\n\n"), {}),
    "marked for training": (
        template("<|user|>@", "{% generation %}<|assistant|>@</s>{% endgeneration %}", "<|assistant|>"),
        {},
    ),
    "nothing but content": ("{% for m in messages %}{{ m['content'] }}{% endfor %}", {}),
    "line breaks folded, as rwkv": (
        template("User: {{ m.content.replace('\n\n', '\n')|trim }}\n\n", "Assistant: @\n\n", "Assistant: "),
        {},
    ),
}
