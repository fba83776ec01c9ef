"""A shape, filled with any contents that meet its conditions, is what Jinja makes of that conversation."""

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
from tests.chat.grammar import Grammar
from tests.support import needs_shared

CONTENTS = [
    *("hello", "two words", "", " ", "\n", "\n\n a", "a \n", "\u00a0a\u00a0", "\u0085b", "\x1cc\x1f", "\u3000d", "x" * 3000),
    *("<think>\nhm\n</think>\n\nso", "</think>", "<think>", "<tool_response>r</tool_response>", "<tool_response>", "{{ x }}"),
    *("{% if %}", "<|im_start|>user", "[INST]", "None", "0", "true", "a", "b", "ab", "user", "<b>&", "é中\U0001f600", "'\"\\"),
    *("Qq", "content", " b ", "z", "/think", "/no_think", "<start_of_image>", "a\0b"),
]
ROLES: list[tuple[str, ...]] = [
    *itertools.product(("user", "assistant", "system", "tool"), repeat=2),
    *(("user", "assistant") * n for n in (2, 5, 15)),
    *(("system", *("user", "assistant") * n) for n in (1, 2, 6)),
    *(("user",), ("assistant",), ("system",), ("developer", "user", "assistant"), ("user", "assistant", "user")),
    *(("user", "assistant", "tool", "assistant"), ("user", "assistant", "tool", "tool", "user", "assistant")),
    *(("user", "user", "assistant", "assistant"), ("user", "system", "assistant"), ("user", "assistant", "system", "user")),
]
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
OURS = {
    "chatml": CHATML,
    "trimmed": "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] | trim }}{{ eos_token }}{% endfor %}",
    "marked": "{% for m in messages %}{% if m.role == 'assistant' %}a:{% generation %}{{ m.content.strip() + '|' }}"
    "{% endgeneration %}{% else %}u:{{ m.content }}|{% endif %}{% endfor %}",
    "system last": "{% if messages[0].role == 'system' %}{% set s = messages[0].content %}{% set rest = messages[1:] %}{% else %}"
    "{% set rest = messages %}{% endif %}{% for m in rest %}<{{ m.role }}>{{ m.content }}{% if loop.last and s is defined %}"
    "({{ s }}){% endif %}{% endfor %}",
    "thinking": "{% for m in messages %}{% set c = m.content %}{% if m.role == 'assistant' and '</think>' in c %}"
    "{% set c = c.split('</think>')[-1].lstrip('\\n') %}{% endif %}{{ '<' + m.role + '>' + c }}{% endfor %}",
    "macro": "{% macro show(m) %}<{{ m.role }}>{{ m.content if m.content is string else m.content | tojson }}{% endmacro %}"
    "{% for m in messages %}{{ show(m) }}{% endfor %}",
}


def fill(template: ChatTemplate, roles: Sequence[str], contents: Sequence[str]) -> Rendered | None:
    """The conversation by its shape; None where it is left to the general way."""
    shape = template.shape(roles)
    if shape is None or template.conditions.broken(contents):
        return None
    return Rendered(*shape.fill(contents))


def by_jinja(template: ChatTemplate, roles: Sequence[str], contents: Sequence[str]) -> object:
    try:
        return template.render([{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)])
    except TemplateError:
        return "refused"


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


@needs_shared
@pytest.mark.parametrize("path", [*TEMPLATES, *OWN_TEMPLATES], ids=name_of)
def test_templates_of_models(path: Any) -> None:
    check(path.read_text(encoding="utf-8"), random.Random(str(path)), 2)


@needs_shared
@pytest.mark.parametrize(
    "name", ["qwen2_5", "qwen3", "llama3_1", "gemma3", "phi3", "gptoss", "deepseekv3", "smollm2", "tiny-chatml-4k"]
)
def test_common_templates_have_shapes(name: str) -> None:
    paths = [path for path in (*TEMPLATES, *OWN_TEMPLATES) if name_of(path) == name]
    if not paths:
        pytest.skip(f"there is no template {name} in the data")
    template = ChatTemplate(paths[0].read_text(encoding="utf-8"), variables=VARIABLES)
    assert fill(template, ("user", "assistant") * 2, ["q", "a", "q", "a"]) is not None


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
    "{{ m.content is sequence }}{{ m.content is iterable }}{{ m.content is mapping }}{{ m.content is number }}",
    "{{ m.content is string }}{{ m.content is defined }}{{ m.content is none }}{{ m.content is true }}",
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
        assert filled is None or filled == by_jinja(jinja, ("user", "assistant"), contents), contents


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 2**32), contents=st.lists(st.sampled_from(CONTENTS) | st.text(max_size=4), min_size=3, max_size=3))
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
    assert filled is None or filled == expected or " at 0x" in str(expected), source


def test_random_templates_have_shapes_at_times() -> None:
    found = 0
    for seed in range(300):
        try:
            template = ChatTemplate(Grammar(seed).template(), variables=VARIABLES)
        except TemplateError:
            continue
        found += template.shape(("user", "assistant")) is not None
    assert found > 50
