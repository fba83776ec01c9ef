"""A shape, filled with any contents that meet its conditions, is what Jinja makes of that
conversation."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sftprep.chat.template import ChatTemplate, Rendered
from sftprep.errors import TemplateError
from tests.chat.cases import OWN_TEMPLATES, TEMPLATES, VARIABLES, name_of
from tests.chat.content_grammar import HEAD, OPERATIONS, TEXTS, ContentGrammar
from tests.chat.grammar import Grammar
from tests.support import needs_shared

CONTENTS = [
    *(
        "hello",
        "two words",
        "",
        " ",
        "\n",
        "\n\n a",
        "a \n",
        "\u00a0a\u00a0",
        "\u0085b",
        "\x1cc\x1f",
        "\u3000d",
        "x" * 3000,
    ),
    *(
        "<think>\nhm\n</think>\n\nso",
        "</think>",
        "<think>",
        "<tool_response>r</tool_response>",
        "<tool_response>",
        "{{ x }}",
    ),
    *(
        "{% if %}",
        "<|im_start|>user",
        "[INST]",
        "None",
        "0",
        "true",
        "a",
        "b",
        "ab",
        "user",
        "<b>&",
        "é中\U0001f600",
        "'\"\\",
    ),
    *("Qq", "content", " b ", "z", "/think", "/no_think", "<start_of_image>", "a\0b"),
    # Halves of what templates look for, which a literal beside the content may complete, and what
    # `%` takes for a layout.
    *(
        "think>",
        "/think>b",
        "a<",
        "</think></think>a",
        "%s",
        "%%",
        "%",
        "a</think>b",
        "abab",
        "\n\n",
        "\t",
        "a\ud800b",
        "5",
        "[]",
    ),
    *(
        "<|channel>thought",
        "Reasoning effort: high",
        "CONTINUE_FINAL_MESSAGE_TAG ",
        "<think></think>",
        "\u2028",
        "word " * 20_000,
    ),
]
ROLES: list[tuple[str, ...]] = [
    *itertools.product(("user", "assistant", "system", "tool"), repeat=2),
    *(("user", "assistant") * n for n in (2, 5, 15)),
    *(("system", *("user", "assistant") * n) for n in (1, 2, 6)),
    *(
        ("user",),
        ("assistant",),
        ("system",),
        ("developer", "user", "assistant"),
        ("user", "assistant", "user"),
    ),
    *(
        ("user", "assistant", "tool", "assistant"),
        ("user", "assistant", "tool", "tool", "user", "assistant"),
    ),
    *(
        ("user", "user", "assistant", "assistant"),
        ("user", "system", "assistant"),
        ("user", "assistant", "system", "user"),
    ),
]
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
OURS = {
    "chatml": CHATML,
    "trimmed": (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] | trim }}{{ eos_token }}{%"
        " endfor %}"
    ),
    "marked": (
        "{% for m in messages %}{% if m.role == 'assistant' %}a:{% generation %}{{"
        " m.content.strip() + '|' }}{% endgeneration %}{% else %}u:{{ m.content }}|{% endif %}{%"
        " endfor %}"
    ),
    "system last": (
        "{% if messages[0].role == 'system' %}{% set s = messages[0].content %}{% set rest ="
        " messages[1:] %}{% else %}{% set rest = messages %}{% endif %}{% for m in rest %}<{{"
        " m.role }}>{{ m.content }}{% if loop.last and s is defined %}({{ s }}){% endif %}{%"
        " endfor %}"
    ),
    "thinking": (
        "{% for m in messages %}{% set c = m.content %}{% if m.role == 'assistant' and '</think>'"
        " in c %}{% set c = c.split('</think>')[-1].lstrip('\\n') %}{% endif %}{{ '<' + m.role +"
        " '>' + c }}{% endfor %}"
    ),
    "macro": (
        "{% macro show(m) %}<{{ m.role }}>{{ m.content if m.content is string else m.content |"
        " tojson }}{% endmacro %}{% for m in messages %}{{ show(m) }}{% endfor %}"
    ),
}


def fill(template: ChatTemplate, roles: Sequence[str], contents: Sequence[str]) -> Rendered | None:
    """The conversation by its shape; None where it is left to the general way."""
    shape = template.shape(roles)
    if shape is None or template.conditions.broken(contents):
        return None
    return Rendered(*shape.fill(contents))


def by_jinja(template: ChatTemplate, roles: Sequence[str], contents: Sequence[str]) -> object:
    try:
        return template.render(
            [
                {"role": role, "content": content}
                for role, content in zip(roles, contents, strict=True)
            ]
        )
    except TemplateError:
        return "refused"


def is_repeatable(text: object) -> bool:
    """Whether a text shows no address in memory, which some templates write, letter by letter
    even."""
    return "at0x" not in "".join(filter(str.isalnum, str(text)))


def compared(source: str, roles: Sequence[str], conversations: Sequence[Sequence[str]]) -> int:
    """How many conversations of these roles went by their shape, each of them compared; -1 where
    there is no shape."""
    try:
        template = ChatTemplate(source, variables=VARIABLES)
    except TemplateError:
        return -1
    if template.shape(roles) is None:
        return -1
    jinja = ChatTemplate(source, variables=VARIABLES, way="jinja")
    went = 0
    for contents in conversations:
        filled = fill(template, roles, contents)
        if filled is not None:
            went += 1
            expected = by_jinja(jinja, roles, contents)
            assert filled == expected or not is_repeatable(expected), (source, roles, contents)
    return went


def some_contents(picked: random.Random, number: int) -> list[str]:
    """Contents of a conversation, out of those above or of letters that the random templates look
    for."""
    letters = ("a", "b", "ab", " ", "<", "%", "\n", "think>", "/")
    return [
        (
            picked.choice(CONTENTS)
            if picked.random() < 0.7
            else "".join(picked.choices(letters, k=picked.randrange(6)))
        )
        for _ in range(number)
    ]


def check(source: str, picked: random.Random, each: int) -> int:
    """How many conversations went by shapes, each of them compared."""
    template = ChatTemplate(source, variables=VARIABLES)
    jinja = ChatTemplate(source, variables=VARIABLES, way="jinja")
    went = 0
    for roles in ROLES:
        for number in range(each):
            mild = number % 2  # with one hostile content among harmless ones, or with any
            contents = [picked.choice(CONTENTS[:2] if mild else CONTENTS) for _ in roles]
            contents[picked.randrange(len(roles))] = picked.choice(CONTENTS)
            filled = fill(template, roles, contents)
            if filled is not None:
                went += 1
                assert filled == by_jinja(jinja, roles, contents), (roles, contents)
    return went


@pytest.mark.parametrize("name", OURS)
def test_own_templates(name: str) -> None:
    assert check(OURS[name], random.Random(name), 20) > 200


WITHOUT_SHAPES = {
    f"{name}{training}"
    for name in ("idefics3", "smolvlm", "llava_next")
    for training in ("", "_training")
}
"""Templates of image models, which take contents for lists of parts and look at the items of
each."""
NO_SYSTEM = {"gemma", "gemma_training", "muse_glimmer", "muse_glimmer_training"}
"""Templates that have no shape for a system message: gemma refuses one, muse_glimmer looks for
words in small letters."""


@needs_shared
@pytest.mark.parametrize("path", [*TEMPLATES, *OWN_TEMPLATES], ids=name_of)
def test_templates_of_models(path: Any) -> None:
    went = check(path.read_text(encoding="utf-8"), random.Random(path.name), 2)
    if name_of(path) not in WITHOUT_SHAPES:
        assert went > 5


@needs_shared
@pytest.mark.parametrize("path", [*TEMPLATES, *OWN_TEMPLATES], ids=name_of)
def test_templates_of_models_have_shapes(path: Any) -> None:
    template = ChatTemplate(path.read_text(encoding="utf-8"), variables=VARIABLES)
    has = name_of(path) not in WITHOUT_SHAPES
    for roles in (("user", "assistant"), ("user", "assistant") * 15):
        assert (
            fill(template, roles, ["What is 2 + 2?", "It is 4.\n"] * (len(roles) // 2)) is not None
        ) == has
    has = has and name_of(path) not in NO_SYSTEM
    assert (
        fill(template, ("system", "user", "assistant"), ["Be brief.", "What is 2 + 2?", " 4 "])
        is not None
    ) == has


PROBES = [
    "{{ m.content[0] }}",
    "{{ m.content[:3] }}",
    "{{ m.content | length }}",
    "{{ m.content | upper }}",
    "{{ m.content | title }}",
    "{{ m.content | tojson }}",
    "{{ m.content | int }}",
    "{{ m.content | float(2) }}",
    "{{ m.content | list }}",
    "{{ m.content | default('d', true) }}",
    "{{ m.content | replace('a', 'b') }}",
    "{{ m.content.replace('a', m.content) }}",
    "{{ 'xay'.replace('a', m.content) }}",
    "{{ m.content.split() }}",
    "{{ m.content.split('a')[0] }}",
    "{{ m.content.split('a') | length }}",
    "{{ m.content.partition('a') }}",
    "{{ m.content.rpartition('a')[2] }}",
    "{{ m.content.find('a') }}",
    "{{ m.content.strip('ab') }}",
    "{{ m.content.strip().strip('<') or 'empty' }}",
    "{{ m.content.lstrip('\\n') ~ m.content.rstrip() }}",
    "{{ m.content.startswith(('a', 'b')) }}",
    "{{ m.content.endswith('') }}",
    "{{ '' in m.content }}",
    "{{ m.content in 'user assistant' }}",
    "{{ m.content in ['a', 'b', m.content] }}",
    "{{ m.content == messages[0].content }}",
    "{{ m.content == m.role }}",
    "{{ m.content != '' }}",
    "{{ m.content < 'b' }}",
    (
        "{{ m.content is sequence }}{{ m.content is iterable }}{{ m.content is mapping }}{{"
        " m.content is number }}"
    ),
    (
        "{{ m.content is string }}{{ m.content is defined }}{{ m.content is none }}{{ m.content is"
        " true }}"
    ),
    "{{ m.content is lower }}",
    "{{ m.content is in 'abc' }}",
    "{{ m.content is eq('a') }}",
    "{{ m.content is sameas(m.content) }}",
    "{{ '%s' % m.content }}",
    "{{ m.content % () }}",
    "{{ m.content * 2 }}",
    "{{ ', '.join([m.content, 'x']) }}",
    "{{ [m.content, 'x'] | join(', ') }}",
    "{{ {'a': m.content} }}",
    "{{ {m.content: 1}.get('a') }}",
    "{{ {'a': 1}[m.content] }}",
    "{{ m.content.foo is defined }}",
    "{{ m.content['foo'] is defined }}",
    "{{ m.content.title is defined }}",
    "{{ m }}",
    "{{ m | tojson }}",
    "{{ m | items | list }}",
    "{{ m | length }}{{ m.keys() | list }}",
    "{% for c in m.content %}{{ c }}{% endfor %}",
    "{% set x = m.content %}{% set x = x + '!' %}{{ x }}{{ x | trim }}",
    "{% set x %}<{{ m.content }}>{% endset %}{{ x }}{{ x | trim }}",
    "{% set x %}{{ m.content }}{% endset %}{% if x %}{{ x.split('a')[-1] }}{% endif %}",
    "{{ ('<' ~ m.content ~ '>').strip('<') }}",
    "{{ (m.content + m.content) == 'aa' }}",
    "{{ '</think>' in (m.content + '</think>') }}",
    "{{ (m.content if m.content else 'none') }}",
    "{{ m.content and 'yes' }}{{ not m.content }}",
    "{{ m.content.removeprefix('a').removesuffix('b') }}",
    "{{ m.content.count('a') }}{{ m.content.isdigit() }}",
    "{{ m.content | safe }}{{ m.content | escape }}",
    "{{ m.content | string | trim | capitalize }}",
    "{{ messages | map(attribute='content') | join('|') }}",
    "{{ messages | selectattr('content', 'eq', 'a') | list | length }}",
    "{{ raise_exception('no') if 'a' in m.content }}{{ m.content }}",
    "{% if m.content is not string %}{{ raise_exception('parts') }}{% endif %}{{ m.content }}",
]


@pytest.mark.parametrize("probe", PROBES)
def test_what_a_template_may_do_with_a_content(probe: str) -> None:
    source = f"{{% for m in messages %}}[{probe}]{{% endfor %}}"
    template = ChatTemplate(source, variables=VARIABLES)
    jinja = ChatTemplate(source, variables=VARIABLES, way="jinja")
    for contents in itertools.product(CONTENTS, ("a", "hello", "")):
        filled = fill(template, ("user", "assistant"), contents)
        assert filled is None or filled == by_jinja(jinja, ("user", "assistant"), contents), (
            contents
        )


@pytest.mark.parametrize("operation", OPERATIONS)
def test_operations_on_contents(operation: str) -> None:
    picked = random.Random(operation)
    for _ in range(5):
        texts = {name: picked.choice(TEXTS) for name in "tu"}
        values = {
            name: picked.choice(
                ["m.content", "messages[0].content", "(c | trim)", "('<' ~ c)", "'a'"]
            )
            for name in "de"
        }
        made = operation.format(
            c=picked.choice(["c", "m.content"]), n=picked.choice("0123"), **texts, **values
        )
        source = (
            HEAD + "{% for m in messages %}[{% set c = m.content %}{{ " + made + " }}]{% endfor %}"
        )
        compared(source, ("user", "%%"), [some_contents(picked, 2) for _ in range(8)])


@settings(max_examples=500, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_random_templates_of_operations(seed: int) -> None:
    picked = random.Random(seed)
    roles = picked.choice(
        [
            ("user", "assistant", "user"),
            ("user", "user"),
            ("system", "user", "assistant"),
            ("a",),
            ("%%", "b"),
        ]
    )
    compared(
        ContentGrammar(seed).template(),
        roles,
        [some_contents(picked, len(roles)) for _ in range(8)],
    )


def test_random_templates_of_operations_go_by_shapes_at_times() -> None:
    picked = random.Random(0)
    went = [
        compared(
            ContentGrammar(seed).template(),
            ("user", "b"),
            [some_contents(picked, 2) for _ in range(4)],
        )
        for seed in range(400)
    ]
    assert sum(shaped >= 0 for shaped in went) > 60
    assert sum(shaped for shaped in went if shaped > 0) > 150


JOINED = [
    "('<think></think>' ~ m.content).split('</think>')[-1]",
    "('<think></think>' ~ m.content ~ '!') | trim",
    "(' ' ~ m.content ~ '!') | trim",
    "(m.content ~ '\\n') | trim",
    "(m.content ~ '|').rstrip('|')",
    "('<' ~ m.content).split('</think>')[0]",
    "(m.content ~ '/think>' ~ m.content) .split('</think>')[0]",
    "(m.content ~ 'b' ~ m.content).split('aba')[0]",
    "(m.content ~ '/think>x').split('</think>')[0]",
    "('a|b|' ~ m.content ~ '|c').split('|', 1)[1]",
    "'aba' in (m.content ~ 'b' ~ messages[0].content)",
    "'ab' in (m.content ~ messages[0].content)",
    "'<b>' in ('<' ~ m.content ~ '>')",
    "('a' ~ m.content ~ 'b').startswith('a')",
    "('a' ~ m.content) == 'a'",
    "('a' ~ m.content) == ('a' ~ messages[0].content)",
    "[m.content, messages[0].content] | join('</think>') | trim",
    "[m.content, 5, none] | join",
]


@pytest.mark.parametrize("made", JOINED)
def test_texts_made_of_contents(made: str) -> None:
    source = "{% for m in messages %}[{{ " + made + " }}]{% endfor %}"
    pairs = [*itertools.product(CONTENTS, ("a", "</think>", "<", " "))]
    compared(source, ("user", "assistant"), pairs)


def test_templates_that_note_turns_have_no_shapes() -> None:
    template = ChatTemplate(CHATML, variables=VARIABLES, turns=True)
    assert template.shape(("user", "assistant")) is None


def test_a_shape_is_good_for_one_order_of_keys() -> None:
    source = (
        "{% for m in messages %}{% for key in m %}{{ key }}={{ m[key] }};{% endfor %}{% endfor %}"
    )
    template, jinja = (
        ChatTemplate(source, variables=VARIABLES, way=way) for way in ("auto", "jinja")
    )
    for content_first in (False, True):
        shape = template.shape(("user", "assistant"), content_first=content_first)
        assert shape is not None
        messages = shape.messages(["a", "b"])
        assert [*messages[0]] == (["content", "role"] if content_first else ["role", "content"])
        assert Rendered(*shape.fill(["a", "b"])) == jinja.render(messages)


def test_conditions_name_the_contents_that_break_them() -> None:
    template = ChatTemplate(
        "{% for m in messages %}{% if '</think>' in m.content %}1{% elif m.content | trim %}2{%"
        " endif %}{% endfor %}",
        variables=VARIABLES,
    )
    assert template.shape(("user", "assistant")) is not None
    contents = [
        "a",
        "x</think>",
        "",
        "\ud800",
        " \u00a0\x1c",
        "</think",
        "think>",
        "\ud800</think>",
        "</think>",
    ]
    assert template.conditions.broken(contents) == [1, 2, 4, 7, 8]
    assert template.conditions.broken([]) == []


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    contents=st.lists(st.sampled_from(CONTENTS) | st.text(max_size=4), min_size=3, max_size=3),
)
def test_random_templates(seed: int, contents: list[str]) -> None:
    source = "{% set m = messages[0] %}" + Grammar(seed).template()
    try:
        template = ChatTemplate(source, variables=VARIABLES)
    except TemplateError:
        return
    jinja = ChatTemplate(source, variables=VARIABLES, way="jinja")
    roles = ("user", "assistant", "user")
    filled = fill(template, roles, contents)
    expected = by_jinja(jinja, roles, contents)
    assert filled is None or filled == expected or not is_repeatable(expected), source


def test_random_templates_have_shapes_at_times() -> None:
    found = 0
    for seed in range(300):
        try:
            template = ChatTemplate(Grammar(seed).template(), variables=VARIABLES)
        except TemplateError:
            continue
        found += template.shape(("user", "assistant")) is not None
    assert found > 50
