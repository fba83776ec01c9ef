"""Contents that a template leaves out, or writes in another case, because of their value."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.conservation import SPECIAL_TOKENS, found_by, make_check
from sftprep.chat_template.template import ChatTemplate
from sftprep.render.omissions.spellings import count_missing, iter_spellings

EACH = "{% for m in messages %}<|im_start|>TURN<|im_end|>\n{% endfor %}"
"""A template that writes `TURN` for each message."""
WITHOUT_REPEATED = (
    "{% set ns = namespace(seen='') %}{% for m in messages %}{% if m.content != ns.seen %}"
    "[{{ m.role }}]{{ m.content }}\n{% endif %}{% set ns.seen = m.content %}{% endfor %}"
)
TRUE_ARGUMENTS = EACH.replace(
    "TURN",
    "{{ m.content }}{% for call in m.tool_calls or [] %}{{ call.function.name }}"
    "{% for key, value in call.function.arguments.items() %}{% if value %} {{ key }}={{ value }}"
    "{% endif %}{% endfor %}{% endfor %}",
)


def omitted(source: str, *contents: str, arguments: dict[str, Any] | None = None) -> set[str]:
    """Return the kinds of omissions of turns of a user and an assistant."""
    roles = ["user", "assistant"] * len(contents)
    messages: list[dict[str, Any]] = [
        {"role": role, "content": content} for role, content in zip(roles, contents, strict=False)
    ]
    if arguments is not None:
        function = {"name": "set_timer", "arguments": arguments}
        messages[-1]["tool_calls"] = [{"type": "function", "function": function}]
    messages = json.loads(json.dumps(messages))  # parsers make each string an object of its own
    template = ChatTemplate(source, variables=SPECIAL_TOKENS)
    rendering = template.render_pieces(messages, None)
    return set(found_by(make_check(source), messages, None, rendering, template))


@pytest.mark.parametrize(
    ("contents", "is_omitted"),
    [
        (("what is the depth", "what is the depth"), True),
        (("yes", "yes"), True),
        (("yes", "yes", "no", "no"), True),
        (("yes", "no", "yes", "no"), False),
        (("the depth", "the depth of the reef", "the depth"), False),
    ],
)
def test_a_repeated_message_that_is_shown_once_is_counted(
    contents: tuple[str, ...], is_omitted: bool
) -> None:
    found = omitted(WITHOUT_REPEATED, *contents)
    assert found == ({"message_not_shown"} if is_omitted else set())


@pytest.mark.parametrize(
    ("contents", "is_omitted"),
    [
        (("no", "no it is not"), True),
        (("no it is not", "no"), True),
        (("noon", "no it is not"), False),
        (("a\nb", "so it is:\na\nb"), False),
    ],
)
def test_a_short_message_within_another_one_is_counted(
    contents: tuple[str, ...], is_omitted: bool
) -> None:
    template = EACH.replace("TURN", "{% if m.content|length > 2 %}{{ m.content }}{% endif %}")
    assert omitted(template, *contents) == ({"message_not_shown"} if is_omitted else set())


@pytest.mark.parametrize(
    ("arguments", "is_omitted"),
    [
        ({"seconds": 0, "minutes": 10}, True),
        ({"seconds": 5, "minutes": 50}, False),
        ({"seconds": 5, "minutes": 5}, False),
    ],
)
def test_an_argument_within_another_one_is_counted(
    arguments: dict[str, Any], is_omitted: bool
) -> None:
    found = omitted(TRUE_ARGUMENTS, "Set it.", "Sure.", arguments=arguments)
    assert found == ({"argument_not_shown"} if is_omitted else set())


@pytest.mark.parametrize(
    ("contents", "is_omitted"),
    [
        (("1 + 1 =", "2"), False),
        (("HI", "OK"), False),
        (("Hi", "OK"), True),
        (("IM", "as"), True),  # which the template writes
    ],
)
@pytest.mark.parametrize("case", ["upper", "title", "capitalize"])
def test_a_change_of_case_is_an_omission_only_where_it_changes_a_content(
    contents: tuple[str, ...], is_omitted: bool, case: str
) -> None:
    template = EACH.replace("TURN", "{{ m.role }}{{ m.content|" + case + " }}")
    changed = [getattr(content, case)() for content in contents]
    is_changed = changed != [*contents]
    if case == "upper":
        assert is_changed == is_omitted
    assert omitted(template, *contents) == ({"message_not_shown"} if is_changed else set())


values = st.text("abc \n\"'é<", min_size=1, max_size=6).map(str.strip).filter(bool) | st.integers(
    0, 120
)


@given(st.lists(values, min_size=1, max_size=6), st.data())
def test_values_that_are_all_written_are_never_missing(
    written: Sequence[str | int], data: Any
) -> None:
    spelled = [data.draw(st.sampled_from([*iter_spellings(value)])) for value in written]
    separators = data.draw(
        st.lists(st.text("ab1\n", max_size=3), min_size=len(written), max_size=len(written))
    )
    text = "".join(part for pair in zip(separators, spelled, strict=True) for part in pair)
    assert not count_missing(written, written, text)


def test_missing_values_are_counted_from_the_longest_one() -> None:
    reef, depth = "the reef", "what is the depth of the reef"
    assert count_missing([depth, depth, reef], [depth, reef], f"{depth}, {reef}") == {depth: 1}
    assert count_missing([depth, depth, reef], [depth, reef], depth) == {depth: 1, reef: 1}
