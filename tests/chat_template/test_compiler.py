"""For any template, the compiled function returns what Jinja returns, or falls back to Jinja."""

from __future__ import annotations

import copy
import datetime
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sftprep.chat_template.compiler.compilation import compile_pieces
from sftprep.chat_template.reference.rendering import compile_template, run_template
from sftprep.chat_template.reference.sandbox import ChatEnvironment
from sftprep.chat_template.template import to_rendered
from sftprep.errors import TemplateError
from tests.chat_template.cases import TOOLS, VARIABLES, Case, turns
from tests.chat_template.grammar import Grammar

GIVEN: dict[str, Any] = {
    "x": {"a": "b", "role": "q", "content": "  z "},
    "y": "  y\n",
    "given": [1, "a"],
    "p": {},
    "m": {"content": "<b>", "role": "user", "tool_calls": [{"a": "b"}]},
}
CASES = [
    Case(turns("a b", "x</think>ya", system=" s "), None, GIVEN),
    Case(
        [
            {"role": "user", "content": "a", "name": "Ann", "items": 3},
            {"role": "assistant", "content": None, "tool_calls": [{"a": 1, "b": "z"}]},
            {"content": ["a"], "role": "user"},
        ],
        TOOLS[1:],
        {"given": {"a": "q", "role": "r"}, "x": "ab", "y": "a", "content": "c", "ns": {"a": 7}},
    ),
    Case(turns("q"), None, {"m": {"role": "M"}, "given": "text"}),
    Case([]),
]


def compare(source: str, cases: list[Case]) -> list[str]:
    """Return the outcome of each case: same, fallback, or refused by both."""
    environment = ChatEnvironment(datetime.date(2024, 2, 29))
    try:
        parsed = compile_template(environment, source)
    except TemplateError:
        return []
    pieces = compile_pieces(parsed.tree, parsed.template, environment)
    went = []
    for case in cases:
        variables = {"documents": None, **VARIABLES, **case.kwargs}
        everything = {
            **variables,
            "messages": case.messages,
            "tools": case.tools,
            "add_generation_prompt": True,
        }
        before = copy.deepcopy(everything)
        slow: Any = None
        with suppress(TemplateError):
            # A copy: Jinja itself lets some templates write into their input.
            slow = run_template(environment, parsed.template, copy.deepcopy(everything))
        try:
            made = pieces.render(case.messages, case.tools, True, variables)
            fast = to_rendered(made)
        except Exception:
            went.append("refused" if slow is None else "fallback")
        else:
            assert slow is not None, (
                f"Jinja refuses {source!r} of {case}, the compiled code returns {fast}\n"
                f"{pieces.source}"
            )
            # Addresses in memory, which templates can print, differ from render to render.
            same = (fast.text, fast.spans) == slow
            # A filter may have split such a text into a list of characters.
            assert same or " at 0x" in slow[0].replace("', '", ""), (
                f"{source!r} of {case}\n{pieces.source}"
            )
            went.append("same")
        assert everything == before, f"{source!r} changed its input"
    return went


@settings(max_examples=250, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_random_templates_give_the_same_as_jinja(seed: int) -> None:
    compare(Grammar(seed).template(), CASES)


def test_random_templates_are_mostly_compiled() -> None:
    went = [how for seed in range(150) for how in compare(Grammar(seed).template(), CASES)]
    assert went.count("same") > 3 * went.count("fallback") > 0
    assert went.count("same") > 100


SCOPES = [
    "{% set x = 1 %}{% for m in messages %}{{ x }}{% set x = 2 %}{{ x }}{% endfor %}{{ x }}",
    "{% for m in messages %}{{ x }}{% set x = m.role %}{% endfor %}{{ x }}",
    "{% for m in messages %}{% if loop.first %}{% set z = m.role %}{% endif %}{{ z }}{% endfor %}",
    (
        "{% if absent %}{% set y = 1 %}{% endif %}{{ y }}{% if absent %}{% else %}{% set y = 2 %}{%"
        " endif %}{{ y }}"
    ),
    "{% if absent %}{% set bos_token = 1 %}{% endif %}{{ bos_token }}",
    "{{ y }}{% set y = y ~ 'more' %}{{ y }}",
    (
        "{% for m in messages %}{% for m in messages %}{{ loop.index }}{{ m.role }}{% endfor %}{{"
        " loop.last }}{{ m }}{% endfor %}"
    ),
    "{% for m in messages %}{% for c in m.role %}{{ loop.index0 }}{{ c }}{% endfor %}{% endfor %}",
    (
        "{% for m in messages %}{% for i in range(loop.index0, loop.length) %}{{ messages[i].role"
        " }}{% endfor %},{% endfor %}"
    ),
    (
        "{% for m in messages if m.role != 'user' %}{{ loop.index }}/{{ loop.length }}{{ m.content"
        " }}{% endfor %}"
    ),
    (
        "{% for m in messages %}{{ loop.previtem.role }}<{{ loop.nextitem is defined }}{{"
        " loop.revindex }}{% endfor %}"
    ),
    (
        "{% for m in messages %}{% if loop.index == 2 %}{% continue %}{% elif loop.last %}{% break"
        " %}{% endif %}{{ m }}{% endfor %}"
    ),
    "{% for m in [] %}x{% endfor %}{% for m in absent %}x{% endfor %}{{ loop }}",
    (
        "{% macro f(a, b='B') %}{{ a }}{{ b }}{{ x }}{% set x = 1 %}{{ x }}{% endmacro %}{{ f()"
        " }}{{ f(b=none.a) }}{{ x }}"
    ),
    "{% macro f(n) %}{% if n > 0 %}{{ n }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(5) }}",
    "{% macro f() %}{{ g() }}{% endmacro %}{% macro g() %}late{% endmacro %}{{ f() }}",
    "{% macro f(a) %}{{ caller() }}{% endmacro %}{% call f(1) %}x{% endcall %}",
    "{% macro f(a) %}{{ varargs }}{{ kwargs }}{% endmacro %}{{ f(1, 2, c=3) }}",
    "{% macro f(a) %}1{% endmacro %}{% macro f(a) %}2{% endmacro %}{{ f() }}{{ f }}",
    "{{ f() }}{% macro f() %}x{% endmacro %}",
    (
        "{% for m in messages %}{% macro f() %}{{ m.role }}{{ loop.index }}{% endmacro %}{{ f()"
        " }}{% endfor %}"
    ),
    (
        "{% for m in messages %}{% macro f() %}x{% endmacro %}{% endfor %}{% for m in messages %}{{"
        " f() }}{% endfor %}"
    ),
    "{% set ns = namespace() %}{{ ns.a }}{% set ns.a = 1 %}{{ ns.a }}{{ ns.items }}{{ ns }}",
    (
        "{% set ns = namespace(a=1) %}{% for m in messages %}{% set ns.a = ns.a + 1 %}{% endfor"
        " %}{{ ns.a }}"
    ),
    (
        "{% for m in messages %}{% if loop.first %}{% set ns = namespace(a=1) %}{% endif %}{{ ns.a"
        " }}{% endfor %}"
    ),
    (
        "{% for m in messages %}{% set ns = namespace(a=m.role) %}{% set ns.b = ns.a %}{{ ns.b }}{%"
        " endfor %}"
    ),
    "{% set ns = namespace(a=1) %}{% set other = ns %}{% set other.a = 2 %}{{ ns.a }}",
    "{% if absent %}{% set ns = namespace(a=1) %}{% endif %}{% set ns.a = 3 %}{{ ns.a }}",
    "{% set ns.a %}{{ messages }}{% endset %}{{ ns }}",
    "{% for m in messages %}{% set m.role %}evil{% endset %}{{ m.role }}{% endfor %}",
    "{% set m.role = 'evil' %}",
    "{% set namespace = 1 %}{% set ns = namespace(a=1) %}{{ ns.a }}",
    (
        "{% set raise_exception = 1 %}{{ raise_exception }}{% if range %}{{ strftime_now is defined"
        " }}{% endif %}"
    ),
    "{% set x %}{{ y }}{% set y = 2 %}{{ y }}{% endset %}{{ x | upper }}{{ y }}",
    "{% set x | upper %}abc{% endset %}{{ x }}",
    (
        "{% set a, b = messages[0].role, 2 %}{{ a }}{{ b }}{% for k, v in messages[0].items() %}{{"
        " k }}{{ v }}{% endfor %}"
    ),
    (
        "{% generation %}{{ y }}{% set y = 1 %}{{ y }}{% endgeneration %}{{ y }}{% generation %}{%"
        " endgeneration %}"
    ),
    (
        "{% for m in messages %}<{% generation %}{{ m.content }}{{ loop.index }}{% endgeneration"
        " %}>{% endfor %}"
    ),
    "{% macro f() %}{% generation %}x{% endgeneration %}{% endmacro %}ab{{ f() }}",
    "{% generation %}a{% generation %}b{% endgeneration %}{% endgeneration %}",
    "{% set x %}{% generation %}x{% endgeneration %}{% endset %}ab{{ x }}",
    (
        "{% with a = y %}{{ a }}{% endwith %}{% filter upper %}x{% endfilter %}{% raw %}{{ x }}{%"
        " endraw %}{# no #}"
    ),
    "{% for a in messages recursive %}{{ loop(messages) if loop.depth < 2 }}{% endfor %}",
]
VALUES = [
    "{{ 'a' + messages[0].content + 'b' }}{{ messages[0].content + messages[0].role }}",
    "{{ '<b>' + (y | safe) }}{{ (y | safe) + '<b>' }}{{ y | safe }}{{ '<' ~ (y | safe) ~ '>' }}",
    (
        "{% set s = '<i>' | safe %}{{ s + '<b>' }}{{ '<b>' + s }}{{ s ~ '<b>' }}{{ s | upper + '<'"
        " }}{{ s.replace('i', '<') }}"
    ),
    "{{ 'a' + 1 }}",
    (
        "{{ [1] + [2] }}{{ 1 + 2 }}{{ 1 ~ 2 }}{{ none }}{{ true }}{{ 1.50 }}{{ {'a': 1} }}{{ (1,)"
        " }}{{ 'é' }}"
    ),
    (
        "{{ absent }}{{ absent is defined }}{{ absent == absent }}{{ absent | length }}{{ absent ~"
        " 'x' }}{{ 'x' if absent }}"
    ),
    "{{ absent + 'x' }}",
    "{{ absent.a }}",
    "{{ absent['a'] is defined }}",
    "{{ none.a }}{{ none.a.b is defined }}",
    "{{ messages[0].items }}",
    "{{ messages[0]['keys'] }}",
    "{{ messages[0].content.title }}{{ messages[0].content['title'] is defined }}",
    "{{ messages[7] is defined }}{{ messages[-1].role }}{{ messages[0][0] is defined }}",
    "{{ y[1] }}{{ y[true] }}{{ y[1:] }}{{ y[::-1] }}{{ y[9] is defined }}",
    (
        "{{ messages['role'] is defined }}{{ messages.role is defined }}{{ y.role is defined }}{{ 5"
        " .a is defined }}{{ 5 .real }}"
    ),
    "{{ y.__class__ is defined }}{{ y['__class__'] is defined }}{{ x['_a'] is defined }}",
    (
        "{{ y.split('y')[0] }}{{ y.split()[0] }}{{ y.split('y')[5] is defined }}{{ ''.split()[0] is"
        " defined }}{{ y.split('')[0] }}"
    ),
    "{{ y.format(1) }}{{ y.encode() }}",
    "{{ x.get('a') }}{{ x.get('zz') }}{{ x.get('zz', 'd') }}{{ x.pop('a') }}",
    "{{ messages.append(1) }}",
    "{{ x | default(absent.b) }}",
    (
        "{{ absent | default('d') }}{{ '' | default('d', true) }}{{ none | default('d') }}{{ x.q |"
        " default([]) }}"
    ),
    "{{ x | tojson }}{{ messages | tojson(indent=2) }}{{ absent | tojson }}",
    (
        "{{ 'a' is string }}{{ 1 is none }}{{ [] is mapping }}{{ x is mapping }}{{ y is iterable"
        " }}{{ 3 is odd }}{{ y is eq y }}"
    ),
    (
        "{{ 7 % 2 }}{{ '%s' % y }}{{ 2 * 3 }}{{ 'a' * 3 }}{{ 7 // 2 }}{{ 2 ** 3 }}{{ 1 / 2 }}{{"
        " -x.zz }}"
    ),
    (
        "{{ y in messages }}{{ 'a' in x }}{{ 'zz' not in x }}{{ 'a' in absent }}{{ 1 < 2 < 3 }}{{"
        " none in [none] }}"
    ),
    "{{ x.a and y or 'z' }}{{ not x }}{{ ('a' and 'b').upper() }}{{ (x or y).a }}",
    (
        "{{ messages | map(attribute='role') | join(',') }}{{ messages | selectattr('role',"
        " 'equalto', 'user') | list | length }}"
    ),
    "{{ messages | map('upper') | list }}",
    (
        "{{ ['b', 'a'] | map('upper') | list | join('-') }}{{ [1, none, 'a'] | join(', ') }}{{ x |"
        " dictsort }}{{ x | items | list }}"
    ),
    (
        "{{ y | trim }}{{ none | trim }}{{ 5 | trim }}{{ absent | trim }}{{ y | trim('y') }}{{ 5 |"
        " string | length }}"
    ),
    (
        "{{ '12' | int }}{{ 'x' | int }}{{ 'x' | float }}{{ 3.7 | round }}{{ messages | first }}{{"
        " messages | last }}"
    ),
    (
        "{{ dict(a=1) }}{{ dict.fromkeys('ab') }}{{ joiner(',')() }}{{ cycler(1, 2).next() }}{{"
        " range(2) }}{{ lipsum(n=0) }}"
    ),
    "{{ strftime_now('%d %b %Y %H:%M') }}{{ strftime_now(1) }}",
    "{{ raise_exception('no') if absent else 'fine' }}{{ absent.a if absent else 'fine' }}",
    (
        "{{ messages is undefined }}{{ messages is not defined }}{{ tools is none }}{{ documents is"
        " none }}"
    ),
    "{{ self }}{{ add_generation_prompt }}",
    "{{ 'a\\n\\'\\\\ \u2028' }}\u2028\\n{{ \"'\" }}",
    "{{ 1e400 }}{{ 10000000000000000000000 }}{{ 0.1 + 0.2 }}",
]


@pytest.mark.parametrize("source", SCOPES + VALUES)
def test_corner_cases_of_jinja(source: str) -> None:
    # Each part alone as well, because the first one that raises hides the others.
    parts = [source, *("{{" + part.partition("}}")[0] + "}}" for part in source.split("{{")[1:])]
    went = [how for part in parts for how in compare(part, CASES)]
    assert went or "recursive" in source


def test_loops_and_scopes_are_compiled() -> None:
    went = [how for source in SCOPES[:12] for how in compare(source, CASES[:1])]
    assert "fallback" not in went
    assert went.count("same") >= 10
