"""Templates from unknown authors: no access to Python, no changes of the input, no huge outputs."""

from __future__ import annotations

import copy
from contextlib import suppress
from typing import Any

import pytest

from sftprep.chat_template.reference.growth_limits import HUGE_SIZE
from sftprep.chat_template.reference.rendering import OUTPUT_FLOOR
from sftprep.chat_template.template import ChatTemplate
from sftprep.errors import TemplateError
from tests.chat_template.cases import turns

BACKENDS: list[Any] = ["auto", "jinja"]

REACHING_OUT = {
    "class walk": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "class walk by item": "{{ ''['__class__']['__mro__'] }}",
    "class walk by filter": "{{ ('' | attr('__class__')).__base__ }}",
    "class walk by map": "{{ messages | map(attribute='__class__.__base__') | list }}",
    "class walk by format": "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "class walk by format_map": "{{ '{a.__class__.__mro__}'.format_map({'a': 1}) }}",
    "class walk by format of markup": "{{ ('{0.__class__.__mro__}' | safe).format(messages) }}",
    "globals of a function": "{{ raise_exception.__globals__['__builtins__'] }}",
    "globals of a filter's helper": "{{ lipsum.__globals__.os.popen('id').read() }}",
    "globals of the clock": "{{ strftime_now.__closure__[0] }}{{ strftime_now.__globals__.x }}",
    "type of dict": "{{ dict.__call__.__globals__.x }}",
    "init of cycler": "{{ cycler.__init__.__globals__.os }}",
    "frame of a generator": "{{ (messages | map('upper')).gi_frame.f_globals }}",
    "namespace with dunder": "{% set ns = namespace(__class__=1) %}{{ ns }}",
    "namespace with dunder, later": "{% set ns = namespace() %}{% set ns.__class__ = 1 %}{{ ns }}",
    "namespace with underscore from dict": (
        "{% set ns = namespace({'_Namespace__attrs': 1}) %}{{ ns }}"
    ),
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}{{ os.name }}",
    "extends": "{% extends '/etc/passwd' %}",
    "json with a hook": "{{ messages | tojson(default=raise_exception) }}",
    "self": "{{ self._TemplateReference__context.parent }}",
    "undefined": "{{ absent.__class__.__init__.__globals__ }}",
}
CHANGING = {
    "append": "{{ messages.append(1) }}",
    "pop of a message": "{{ messages[0].pop('content') }}",
    "update": "{{ messages[0].update({'a': 1}) }}",
    "clear by name": "{% for m in messages %}{{ m['clear']() }}{% endfor %}",
    "sort": "{{ tools.sort() }}",
    "setdefault": "{{ given.setdefault('a', 1) }}",
    "assignment": "{% set m = messages[0] %}{% set m.content = 'evil' %}",
    "block assignment": (
        "{% set m = messages[0] %}{% set m.content %}evil{% endset %}{{ m.content }}"
    ),
    "block assignment to kwargs": "{% set given.a %}evil{% endset %}{{ given.a }}",
    "namespace from outside": (
        "{% if absent %}{% set given = namespace(a=1) %}{% endif %}{% set given.a = 2 %}"
    ),
    "map": "{{ [messages] | map('append', 1) | list }}",
}
HUGE = {
    "range": "{% for i in range(1000000000) %}x{% endfor %}",
    "repeat": "{{ 'a' * 10000000000 }}",
    "repeat, other way": "{{ 10000000000 * ('a', ) }}",
    "power": "{{ 10 ** (10 ** 10) }}",
    "power of power": "{{ 9 ** (9 ** 9) }}",
    "percent": "{{ '%0999999999d' % 1 }}",
    "percent star": "{{ '%0*d' % (999999999, 1) }}",
    "percent filter": "{{ '%0999999999d' | format(1) }}",
    "format width": "{{ '{:999999999}'.format(1) }}",
    "format nested width": "{{ '{:{}}'.format(1, 999999999) }}",
    "center": "{{ 'a' | center(999999999) }}",
    "ljust": "{{ 'a'.ljust(999999999) }}",
    "zfill by item": "{{ 'a'['zfill'](999999999) }}",
    "tabs": "{{ '\t'.expandtabs(999999999) }}",
    "indent": "{{ 'a\nb' | indent(999999999) }}",
    "json indent": "{{ messages | tojson(indent=999999999) }}",
    "lipsum": "{{ lipsum(n=99999999) }}",
    "loops in loops": (
        "{% for i in range(9999) %}{% for j in range(9999) %}xxxxxxxxxxxxxxxxxxxxxxxx{% endfor %}{%"
        " endfor %}"
    ),
    "long lines in a loop": (
        "{% for i in range(99999) %}{{ messages | tojson }}" + "y" * 2000 + "{% endfor %}"
    ),
    "macro without end": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
}

LONG = "{% set a = 'a' * 100000 %}"
MULTIPLYING = {
    "replace": f"{LONG}{{{{ a.replace('a', a) | length }}}}",
    "replace nothing": f"{LONG}{{{{ a.replace('', a) | length }}}}",
    "replace by name": f"{LONG}{{% set f = a.replace %}}{{{{ f('a', a) | length }}}}",
    "replace of markup": f"{LONG}{{{{ (a | safe).replace('a', a) | length }}}}",
    "replace filter": f"{LONG}{{{{ a | replace('a', a) | length }}}}",
    "replace filter, mapped": f"{LONG}{{{{ [a] | map('replace', 'a', a) | list | length }}}}",
    "join": f"{LONG}{{{{ a.join(a) | length }}}}",
    "join of a list": f"{LONG}{{{{ a.join(a | list) | length }}}}",
    "join of a generator": f"{LONG}{{{{ a.join(a | list | map('upper')) | length }}}}",
    "join filter": f"{LONG}{{{{ a | join(a) | length }}}}",
    "join of one string": f"{LONG}{{{{ ([a] * 10000) | join | length }}}}",
    "join of attributes": f"{LONG}{{{{ ([{{'a': a}}] * 10000) | join(attribute='a') | length }}}}",
    "translate": f"{LONG}{{{{ a.translate({{97: a}}) | length }}}}",
    "translate by list": f"{LONG}{{{{ a.translate([a] * 128) | length }}}}",
    "sum of lists": "{% set a = [0] * 1000000 %}{{ ([a] * 1000) | sum(start=[]) | length }}",
    "sum of attributes": (
        "{% set a = [0] * 1000000 %}"
        "{{ ([{'a': a}] * 1000) | sum(attribute='a', start=[]) | length }}"
    ),
    "format of fields": f"{LONG}{{{{ ('{{0}}' * 10000).format(a) | length }}}}",
    "format_map of fields": f"{LONG}{{{{ ('{{a}}' * 10000).format_map({{'a': a}}) | length }}}}",
    "percent of fields": f"{LONG}{{{{ (('%(a)s' * 10000) % {{'a': a}}) | length }}}}",
    "format filter of fields": (f"{LONG}{{{{ ('%(a)s' * 10000) | format(a=a) | length }}}}"),
    "indent by a string": f"{LONG}{{{{ ('x\n' * 100000) | indent(a) | length }}}}",
    "many small indents": "{{ ('x\n' * 1000000) | indent(9999) | length }}",
    "many tabs": "{{ ('\t' * 1000000).expandtabs(9999) | length }}",
    "many long paragraphs": "{{ lipsum(9999, max=9999) | length }}",
    "wordwrap": f"{LONG}{{{{ ('x ' * 100000) | wordwrap(1, wrapstring=a) | length }}}}",
    "json indent by a string": f"{LONG}{{{{ ([0] * 100000) | tojson(indent=a) | length }}}}",
    "json separators": f"{LONG}{{{{ ([0] * 100000) | tojson(separators=(a, a)) | length }}}}",
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "source", [pytest.param(source, id=name) for name, source in REACHING_OUT.items()]
)
def test_a_template_cannot_access_python(source: str, backend: Any) -> None:
    with pytest.raises(TemplateError):
        ChatTemplate(source, variables={}, backend=backend).render(turns("a", "b"), tools=[{}])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "source", [pytest.param(source, id=name) for name, source in CHANGING.items()]
)
def test_a_template_cannot_modify_its_input(source: str, backend: Any) -> None:
    messages, tools, kwargs = turns("a", "b"), [{"name": "t"}, {}], {"given": {"b": 1}}
    before = copy.deepcopy((messages, tools, kwargs))
    template = ChatTemplate(source, variables={}, backend=backend)
    for _ in range(2):
        with suppress(TemplateError):
            template.render(messages, tools=tools, template_kwargs=kwargs)
        assert (messages, tools, kwargs) == before


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("source", [pytest.param(source, id=name) for name, source in HUGE.items()])
def test_huge_values_are_rejected(source: str, backend: Any) -> None:
    with pytest.raises(TemplateError):
        ChatTemplate(source, variables={}, backend=backend).render(turns("a"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "source", [pytest.param(source, id=name) for name, source in MULTIPLYING.items()]
)
def test_operations_that_multiply_strings_or_lists_are_rejected_before_they_run(
    source: str, backend: Any
) -> None:
    with pytest.raises(TemplateError, match="SecurityError"):
        ChatTemplate(source, variables={}, backend=backend).render(turns("a"))
    source = f"{{% for m in messages %}}{source}{{% endfor %}}"
    with pytest.raises(TemplateError, match="SecurityError"):
        ChatTemplate(source, variables={}, backend=backend).render(turns("a"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_outputs_of_large_inputs_are_allowed(backend: Any) -> None:
    template = ChatTemplate(
        "{% for m in messages %}{{ m.content * 1 }}{{ m.content }}{{ m.content }}{% endfor %}",
        variables={},
        backend=backend,
    )
    content = "x" * OUTPUT_FLOOR
    assert len(template.render(turns(content, content)).text) == 6 * OUTPUT_FLOOR
    assert ChatTemplate(
        "{{ '-' * 40 }}{{ '%5.1f|%s' % (1, 'a') }}{{ '{:>8}'.format(1) }}",
        variables={},
        backend=backend,
    ).render([]).text == ("-" * 40 + "  1.0|a" + "       1")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_template_can_rewrite_long_conversations(backend: Any) -> None:
    source = (
        "{% for m in messages %}"
        "{{ m.content.replace('x', '-+') }}{{ m.content | replace('x', 'y') }}"
        "{{ m.content.replace(m.role, m.content) }}"
        "{% endfor %}"
        "{{ messages[0].role.join(['a', 'b']) }}"
        "{{ messages | map(attribute='content') | join(', ') }}"
        "{{ ''.join(messages | map(attribute='role')) }}{{ ', '.join([messages[0].role] * 3) }}"
        "{{ ['ab', 'c'] | join(messages[0].role) }}{{ messages | sum(attribute='n', start=0) }}"
        "{{ ([[1], [2]] | sum(start=[])) }}{{ '%s %s' % (1, 2) }}{{ '{} {}'.format(1, 2) }}"
    )
    content = "x" * (HUGE_SIZE + 1)
    messages = [{"role": "user", "content": content, "n": 1}]
    text = ChatTemplate(source, variables={}, backend=backend).render(messages).text
    end = "auserb" + content + "user" + "user, user, user" + "abuserc" + "1" + "[1, 2]" + "1 21 2"
    assert text == "-+" * len(content) + "y" * len(content) + content + end


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_state_survives_a_render(backend: Any) -> None:
    source = (
        "{{ x }}{% set x = 1 %}{% set ns = namespace(n=0) %}{% set ns.n = ns.n + 1 %}{{ ns.n }}"
    )
    source += "{% set c = cycler(1, 2) %}{{ c.next() }}"
    template = ChatTemplate(source, variables={}, backend=backend)
    assert {template.render([]).text for _ in range(3)} == {"11"}


def test_spans_of_a_render_that_failed_are_forgotten() -> None:
    source = "{% generation %}{{ messages[0].content }}{% endgeneration %}"
    source += "{% if messages[0].role != 'user' %}{{ raise_exception('no') }}{% endif %}"
    template = ChatTemplate(source, variables={}, backend="jinja")
    with pytest.raises(TemplateError):
        template.render([{"role": "x", "content": "long text"}])
    assert template.render([{"role": "user", "content": "ab"}]).spans == ((0, 2),)
