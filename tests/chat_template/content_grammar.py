"""Random chat templates that do things with the contents of messages, most of them things that need
the content itself."""

from __future__ import annotations

from tests.chat_template.grammar import Grammar

CONTENTS = [
    *(
        "m.content",
        "m['content']",
        "messages[0].content",
        "messages[-1]['content']",
        "c",
        "c",
        "c",
        "(m.content | trim)",
    ),
    *("('<' ~ c)", "(c + ' a')", "('ab' ~ m.content ~ 'b')", "(c ~ '</think>')"),
]
TEXTS = [
    "'a'",
    "'b'",
    "''",
    "'ab'",
    "' '",
    "'\\n'",
    "'</think>'",
    "'<'",
    "'%%'",
    "'%s'",
    "m.role",
    "'<think></think>'",
]
_OPERATIONS = """
{c}[0] @ {c}[1:] @ {c}[:{n}] @ {c} | length @ {c} | length > 0 @ {c} | length == {n}
{c} | count > 1 @ {c} | upper @ {c} | lower @ {c} | title @ {c} | capitalize @ {c} | trim
{c} | trim({t}) @ {c} | int @ {c} | int({d}) @ {c} | float @ {c} | float({d}) @ {c} | list
{c} | list | length @ {c} | first @ {c} | last @ {c} | tojson @ [{c}] | tojson(indent={d})
{c} | default({d}, true) @ {d} | default({c}, {e}) @ {c} | replace({t}, {u})
{t} | replace({u}, {c}) @ {c} | string @ [{d}, {e}] | join({t}) @ [{c}, {d}] | join({c})
{c} | join @ messages | map(attribute='content') | join({t}) @ {c} | abs @ {n} | round({c})
{c} | round @ {c} | safe ~ '<' @ ({c} | safe) + '<' @ ('<' | safe) + {c} @ {c} | escape
{{'k': {c}}} | dictsort @ {{'b': {c}, 'a': {d}}} | dictsort(by='value') | length
{{'k': {c}}}.get('k') @ {{'k': 1}}.get({c}) @ {{'k': {c}}} | items | list | length
{{{c}: 1}} | length @ {{'k': {c}}}['k'] @ {{'a': 1}}[{c}] @ {c}[{d}] @ [1, 2][{c}]
[{c}, {d}] | map('trim') | list @ [{c}] | map('length') | list @ [{c}] | map('string') | join({t})
[{c}] | map('int') | list @ [{c}, {d}] | select | list | length
[{c}, {d}] | reject('eq', {e}) | list | length @ [{c}] | select('callable') | list | length
[{c}, {d}] | select('in', [{t}, {e}]) | list | length
[{c}] | select('sameas', {d}) | list | length @ [{c}] | select('sequence') | list | length
[{c}] | select('escaped') | list | length @ [{c}] | reject('lower') | list
[{t}] | select('divisibleby', {c}) | list | length @ [{c}] | selectattr('title') | list | length
[{c}] | selectattr({d}) | list @ messages | selectattr('content', 'eq', {t}) | list | length
messages | selectattr('content') | list | length
messages | rejectattr('content', 'in', {t}) | list | length
messages | selectattr('content.0') | list | length @ {c} is string @ {c} is defined @ {c} is none
{c} is mapping @ {c} is iterable @ {c} is sequence @ {c} is number @ {c} is boolean @ {c} is integer
{c} is float @ {c} is true @ {c} is lower @ {c} is upper @ {c} is odd @ {c} is callable
{c} is eq({d}) @ {c} is ne({t}) @ {c} is in({t}) @ {t} is in({c}) @ {c} is in([{d}, {t}])
{c} is sameas({d}) @ {c} is divisibleby({n}) @ {t} is divisibleby({c}) @ {n} is divisibleby({c})
{c} is escaped @ {c} is filter @ {c} == {t} @ {t} == {c} @ {c} == {d} @ {c} != {t} @ {c} < {t}
{t} >= {c} @ {c} == {n} @ {c} == absent @ none == {c} @ {t} in {c} @ {t} not in {c} @ {c} in {t}
{c} in [{t}, {u}] @ {c} in ({t}, {d}) @ {c} in [{d}] @ {c} in {{'a': 1}} @ {d} in {c} @ {n} in {c}
[{c}] == [{d}] @ [{c}] < [{t}] @ m == messages[0] @ m in messages[1:] @ messages.index(m)
[{c}, {d}].count({t}) @ [{c}, {t}].index({u}) @ ({c}, {t}) == ({d}, {t})
{{'k': {c}}} == {{'k': {d}}} @ {c}.strip() @ {c}.strip({t}) @ {c}.lstrip({t}) @ {c}.rstrip({t}, {u})
{c}.strip(none) @ {c}.strip(absent) @ {t}.strip({c}) @ {c}.split({t})[0] @ {c}.split({t})[-1]
{c}.split({t})[1] @ {c}.split({t}) | length @ {c}.split()[0] @ {c}.split() @ {c}.split({t}, {n})[0]
{c}.split({t}, {u})[0] @ {c}.split({t}, absent)[0] @ {c}.split(sep={t})[0] @ {c}.rsplit({t}, 1)[-1]
{c}.split(separator={t})[0] @ {c}.split({t}, _most={n})[0] @ {c}.split({t}, most={n})[0]
{c}.rsplit({t})[0] @ {t}.split({c}) @ {c}.split({t})[0].split({u})[-1]
{c}.split({t}, 100000000000000000000000)[0] @ {c}.splitlines() @ {c}.partition({t})[0]
{c}.partition({t})[2] @ {c}.rpartition({t})[2] @ {c}.partition(separator={t})[0]
{t}.partition({c})[0] @ {c}.find({t}) @ {c}.replace({t}, {u}) @ {c}.replace({t}, absent)
{c}.replace({t}, {n}) @ {c}.replace({t}, {u}, {n}) @ {c}.replace({t}, {d})
{c}.replace({t}, {u}, {u}) @ {t}.replace({u}, {c}) @ {t}.replace({c}, {u})
{c}.replace(old={t}, new={u}) @ {c}.removeprefix({t}) @ {c}.removesuffix({t})
{c}.removeprefix(absent) @ {c}.removeprefix(text={t}) @ {c}.count({t}) @ {c}.startswith({t})
{c}.startswith(({t}, {u})) @ {c}.startswith({t}, 1) @ {c}.startswith(texts={t}) @ {c}.startswith(())
{c}.endswith({t}) @ {c}.endswith([{t}]) @ {c}.startswith(({t}, ({u},))) @ {t}.startswith({c})
{t}.startswith(({t}, {c})) @ {c}.upper() @ {c}.title() @ {c}.isdigit() @ {c}.join([{t}, {u}])
{t}.join([{c}, {d}]) @ {c}.format({t}) @ {t}.format({c}) @ {c}.get({t}) @ {c}.items() @ {c}.parts
{c}._noted @ {c}.title @ {c}.zzz is defined @ {c}['parts'] is defined @ {c}.__class__ @ {c} ~ {t}
{t} ~ {c} @ {c} + {t} @ {t} + {c} @ {c} + {d} @ {c} ~ {d} ~ {t} @ {t} ~ {c} ~ {u} @ {c} + {n}
{c} * 2 @ 2 * {c} @ {c} % {t} @ {t} % {c} @ {c} - 1 @ -{c} @ {c} / 2 @ {c} // {d} @ {c} ** 2 @ +{c}
[1] + {c} @ {c} and {d} @ {c} or {t} @ not {c} @ {t} and {c} @ {c} if {d} else {t}
{t} if {c} else {u} @ range({c}) | list @ strftime_now({c}) @ raise_exception({c})
raise_exception({t}) if {t} in {c} else {d} @ mac({c}) @ mac({c}, {d}) @ mac(q={c}) @ [{c}]
[{c}, {d}][0] @ [{c}, {d}][-1] @ ({c}, 1)[0] @ [{c}][:1][0] @ [{c}, 1] | length @ m @ m | tojson
m.items() | list @ m | length @ m | list @ m.values() | list @ (m.items() | list)[1][1]
messages | length @ messages[::-1][0].content @ ('<think></think>' ~ {c}).split('</think>')[-1]
({t} ~ {c} ~ {u}) | trim @ ({t} ~ {c}).split({u})[-1] @ ({t} ~ {c} ~ {u}).split({t}) | join('|')
({c} ~ {t}).strip({u}) @ ({t} ~ {c} ~ {t}).lstrip() @ {u} in ({t} ~ {c} ~ {u})
({c} ~ {t} ~ {d}).split({u})[0] @ ({t} ~ {c}) == ({t} ~ {c}) @ ({t} ~ {c}) is string
({c} ~ {t}) | length > 0
"""
OPERATIONS = [
    operation for line in _OPERATIONS.strip().splitlines() for operation in line.split(" @ ")
]
"""What may be done with a content c: t and u are texts, d and e a content or a text, n is a
number."""
PARTS = [
    *(
        "{{ $ }}",
        "{{ $ }}",
        "{{ $ }}{{ $ }}",
        "{% if $ %}yes{{ c }}{% else %}no{{ $ }}{% endif %}",
        "{% set c = $ %}{{ $ }}",
    ),
    *(
        "{% set c %}{{ $ }}{% endset %}{{ c | trim }}",
        "{% set c %} x{{ $ }}y{% endset %}{{ c | trim }}{{ $ }}",
    ),
    *(
        "{% generation %}{{ $ }}|{% endgeneration %}",
        "{% generation %}{{ $ }}{% endgeneration %}{{ $ }}",
    ),
    *("{% set ns.b = $ %}{{ ns.b }}", "{% for x in $ %}({{ x }}){% endfor %}"),
]
HEAD = (
    "{% set ns = namespace(a=1, b='t') %}{% macro mac(p, q='k') %}<{{ p }}{{ q | trim }}>{%"
    " endmacro %}{% set m = messages[0] %}{% set c = m.content %}{{ bos_token }}"
)


class ContentGrammar(Grammar):
    """Writes one template. A part that needs the content itself leaves the whole of it to the
    general way: parts are few."""

    def template(self) -> str:
        parts = "".join(map(self.part, self.choose(([1], [1], [1], [1, 2]))))
        return f"{HEAD}{{% for m in messages %}}[{{% set c = m.content %}}{parts}]{{% endfor %}}"

    def part(self, depth: int) -> str:
        first, *others = self.choose(PARTS).split("$")
        return first + "".join(
            self.of_a_content(self.choose((1, 1, 1, 2))) + other for other in others
        )

    def of_a_content(self, depth: int) -> str:
        content = self.choose(CONTENTS) if depth == 1 else f"({self.of_a_content(depth - 1)})"
        return self.choose(OPERATIONS).format(
            c=content,
            d=self.choose((self.choose(CONTENTS), self.choose(TEXTS))),
            e=self.choose(CONTENTS + TEXTS),
            t=self.choose(TEXTS),
            u=self.choose(TEXTS),
            n=self.choose("01235"),
        )
