"""The kinds of omissions: content of a conversation missing from its rendered text."""

from __future__ import annotations

MESSAGE = "message_not_shown"
REASONING = "reasoning_not_shown"
CALL = "call_not_shown"
ARGUMENT = "argument_not_shown"
TEXT_WITH_CALL = "text_with_call_not_shown"
TOOLS = "tools_not_shown"
NAME = "name_not_shown"
KEY = "key_not_shown"

LAST_REASONING = "last_reasoning_not_shown"
"""The kind of warning about the records of `REASONING` that lack the reasoning of the last turn,
which no setting can keep."""

NO_REASONING = "template_without_reasoning"
"""The kind of warning about the records of `REASONING` whose template shows no reasoning of that
form, not even in the last turn."""

NO_TEXT_WITH_CALL = "template_without_text_with_call"
"""The kind of warning about records of `TEXT_WITH_CALL` whose template does not show such text in
the last turn either."""

REASONING_LEFT = "reasoning_left"
"""The kind of warning about records with tags of reasoning that `reasoning="drop"` does not
remove."""

VARIABLE_NOT_READ = "template_kwarg_not_read"
"""The kind of warning about variables of a record that its template does not read."""

SYSTEM_ADDED = "system_added"
"""The kind of warning about records that received the system message of the settings."""

COLUMN_NOT_READ = "column_not_read:"
"""The start of the kind of warning about a column of records that no format reads, although its
name suggests content. The kind ends with the name."""

NO_COMPARED_KEY = "compared_key_missing:"
"""The start of the kind of warning about records without a key by which records are compared. The
kind ends with the key."""

OMISSION_KINDS = {
    MESSAGE: "the content of a message",
    REASONING: "reasoning",
    CALL: "a tool call",
    ARGUMENT: "an argument of a tool call",
    TEXT_WITH_CALL: "the text alongside a tool call",
    TOOLS: "a name, a description or a value in the schema of a tool",
    NAME: "the name of a speaker",
    KEY: "text under a key without a known meaning",
}
"""The kinds of omissions, in the order in which they are reported, with what is omitted."""
