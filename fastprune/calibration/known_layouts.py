"""The layouts that are recognized, and the columns that show them.

A layout of another data set is one more entry in :data:`KNOWN`, and a line in ``docs/data.md``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

REQUIRED = ("prompt", "response")
OPTIONAL = ("prefill", "category", "id", "finish", "history")
FIELDS = REQUIRED + OPTIONAL
MESSAGES = "messages"


@dataclass(frozen=True)
class Known:
    """A layout that is recognized: its name for people, and its columns in lower case.

    Attributes:
        name: As people call it.
        prompt: Column of the prompt, or of the conversation.
        response: Column of the response; ``None`` in layouts without one.
        before: Column that stands before the prompt, where it is not empty.
        after: The same, after the prompt.
        joint: What joins them.
        conversation: Whether ``prompt`` is a list of messages, the response among them.
        aliases: Further columns of optional fields, the first one that is there.
        note: What a user should know.
    """

    name: str
    prompt: str
    response: str | None = None
    before: str | None = None
    after: str | None = None
    joint: str = "\n\n"
    conversation: bool = False
    aliases: Mapping[str, Sequence[str]] = field(default_factory=dict)
    note: str = ""

    @property
    def complete(self) -> tuple[str, ...]:
        """The columns that make it a layout with responses; empty for one without."""
        if self.conversation:
            return (self.prompt,)
        return () if self.response is None else (self.prompt, self.response)


OWN = Known("fastprune", "prompt", "response")
CONVERSATION = Known("conversations", MESSAGES, conversation=True)
_GOAL = {"id": ("index",)}
_AFFIRMATIVE = "the target is an affirmative start: with the columns prompt=goal,prefill=target it is context"
KNOWN = (
    OWN,
    Known("prompt and completion", "prompt", "completion"),
    Known("AdvBench", "goal", "target", aliases=_GOAL, note=_AFFIRMATIVE),
    Known("Alpaca", "instruction", "output", after="input"),
    Known("Dolly", "instruction", "response", after="context"),
    Known("question and answer", "question", "answer"),
    Known("query and response", "query", "response"),
    CONVERSATION,
    Known("conversations", "conversations", conversation=True),
    Known("conversations", "conversation", conversation=True),
    Known(
        "HarmBench",
        "behavior",
        before="contextstring",
        joint="\n\n---\n\n",  # as HarmBench itself asks
        aliases={"id": ("behaviorid",), "category": ("semanticcategory", "functionalcategory")},
    ),
    Known("StrongREJECT", "forbidden_prompt"),
    Known("text", "text"),
)
# Columns by which a table shows what it is, so that a header is told from a prompt.
HEADERS = frozenset(name for known in KNOWN for name in (known.prompt, known.response) if name is not None)
# Where one of these is not used, the experiment may be another one than meant.
WORTH_SAYING = HEADERS | {"system", "system_prompt", "history", "input", "context"}
