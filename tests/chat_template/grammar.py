"""Random chat templates: small programs that use everything that the compiler translates, and some
constructs that it does not."""

from __future__ import annotations

import random
from collections.abc import Callable

NAMES = [
    "messages",
    "tools",
    "x",
    "y",
    "m",
    "p",
    "bos_token",
    "given",
    "absent",
    "add_generation_prompt",
    "content",
]
KEYS = ["role", "content", "name", "a", "b", "items", "title", "tool_calls"]
TEXTS = ["'a'", "''", "'user'", "' b '", "'</think>'", "'<b>'", "'role'", "'\\n'"]
OTHERS = [
    "0",
    "1",
    "2",
    "true",
    "false",
    "none",
    "[]",
    "1.5",
    "range(3)",
    "raise_exception('no')",
    "ns",
]
FILTERS = [
    *(
        "trim",
        "length",
        "string",
        "upper",
        "list",
        "safe",
        "tojson",
        "int",
        "items",
        "dictsort",
        "capitalize",
        "first",
        "reverse",
    ),
    *(
        "default('d')",
        "default(absent.b)",
        "default('e', true)",
        "join(',')",
        "join",
        "replace('a', '<')",
        "map('upper')",
    ),
    *(
        "tojson(indent=1)",
        "selectattr('role', 'equalto', 'user')",
        "string | trim",
        "trim('a')",
        "escape",
    ),
]
TESTS = [
    "defined",
    "undefined",
    "none",
    "string",
    "mapping",
    "iterable",
    "sequence",
    "boolean",
    "true",
    "number",
    "eq('a')",
    "odd",
]
METHODS = [
    *(
        ".strip()",
        ".split('a')",
        ".split('</think>')[-1]",
        ".split('a')[0].rstrip('b')",
        ".startswith('a')",
        ".get('role')",
    ),
    *(
        ".items()",
        ".lstrip('\\n')",
        ".upper()",
        ".replace('a', 'b')",
        ".get('a', 'z')",
        ".keys()",
        ".format(1)",
        ".endswith(y)",
    ),
    *(
        ".title()",
        "[0]",
        "[-1]",
        "[1:]",
        "[::-1]",
        "[:2]",
        "['role']",
        "['items']",
        "[x]",
        "[loop.index0 - 1]",
        "[1]",
    ),
]
LOOP = ["index", "index0", "first", "last", "length", "revindex", "previtem", "nextitem", "cycle"]


class Grammar:
    """Writes one random template. Nearly all of them parse; about half of them run."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.choose = self.random.choice
        self.in_loop = 0
        self.in_generation = False

    def template(self) -> str:
        head = "{% set ns = namespace(a=1, b='t') %}" if self.random.random() < 0.7 else ""
        if self.random.random() < 0.4:
            head += f"{{% macro mac(p, q='k') %}}{self.body(1)}{{% endmacro %}}"
        return head + self.body(3)

    def body(self, depth: int) -> str:
        kinds = [
            self.output,
            self.data,
            self.assign,
            self.namespace,
            self.branch,
            self.loop,
            self.block,
            self.generation,
            self.word,
        ]
        weights = [30, 6, 14, 4, 18, 18, 4, 4, 2]
        picked = self.random.choices(kinds, weights, k=self.random.randint(1, 3))
        return "".join((kind if depth else self.output)(depth - 1) for kind in picked)

    def output(self, depth: int) -> str:
        return "{{ " + self.expression(2) + " }}"

    def data(self, depth: int) -> str:
        return "data\n"

    def assign(self, depth: int) -> str:
        target = self.choose(
            ["x", "y", "m", "content", "messages", "ns.a", "ns.b", "ns.c", "x, y", "p"]
        )
        return f"{{% set {target} = {self.expression(2)} %}}"

    def namespace(self, depth: int) -> str:
        return f"{{% set ns = namespace(a={self.expression(1)}) %}}"

    def branch(self, depth: int) -> str:
        text = f"{{% if {self.expression(2)} %}}{self.body(depth)}"
        if self.random.random() < 0.4:
            text += f"{{% elif {self.expression(1)} %}}{self.body(depth)}"
        if self.random.random() < 0.5:
            text += "{% else %}" + self.body(depth)
        return text + "{% endif %}"

    def loop(self, depth: int) -> str:
        over = self.choose(
            [
                "messages",
                "messages",
                "messages",
                "m.tool_calls",
                "messages[::-1]",
                self.expression(2),
            ]
        )
        name = self.choose(["m", "m", "m", "x", "p", "k, v"])
        if name == "k, v":
            over = self.choose(
                ["m.items()", "messages[0] | items", "given | dictsort", "given.items()"]
            )
        only = f" if {self.expression(1)}" if self.random.random() < 0.1 else ""
        self.in_loop += 1
        text = f"{{% for {name} in {over}{only} %}}{self.body(depth)}"
        self.in_loop -= 1
        return text + (
            "{% else %}none{% endfor %}" if self.random.random() < 0.05 else "{% endfor %}"
        )

    def block(self, depth: int) -> str:
        return f"{{% set {self.choose(['x', 'y', 'ns.a'])} %}}{self.body(depth)}{{% endset %}}"

    def generation(self, depth: int) -> str:
        if self.in_generation and self.random.random() < 0.9:
            return "data"
        before = self.in_loop, self.in_generation
        self.in_loop, self.in_generation = 0, True
        text = f"{{% generation %}}{self.body(depth)}{{% endgeneration %}}"
        self.in_loop, self.in_generation = before
        return text

    def word(self, depth: int) -> str:
        if self.in_loop:
            return (
                f"{{% if {self.expression(1)} %}}{{% {self.choose(['break', 'continue'])} %}}{{%"
                " endif %}"
            )
        return (
            f"{{% macro {self.choose(['mac', 'other'])}(p, q=2) %}}{self.body(depth)}{{%"
            " endmacro %}"
        )

    def expression(self, depth: int) -> str:
        kinds: list[Callable[[int], str]] = [
            self.simple,
            self.field,
            self.of_loop,
            self.sum,
            self.compare,
            self.logic,
        ]
        kinds += [self.choice, self.filter, self.test, self.method, self.call]
        kind = self.random.choices(kinds, [25, 20, 10, 10, 7, 6, 4, 9, 4, 4, 2])[0]
        return kind(depth - 1) if depth else self.simple(depth)

    def simple(self, depth: int) -> str:
        return self.choose([self.choose(NAMES), self.choose(TEXTS), self.choose(OTHERS)])

    def field(self, depth: int) -> str:
        owner = self.choose(["m", "m", "m", "x", "p", "messages[0]", "given"])
        return owner + self.choose([f".{self.choose(KEYS)}", f"[{self.choose(KEYS)!r}]"])

    def of_loop(self, depth: int) -> str:
        return (
            "loop." + self.choose(LOOP)
            if self.in_loop and self.random.random() < 0.5
            else "ns." + self.choose("abc")
        )

    def sum(self, depth: int) -> str:
        return f"({self.expression(depth)} {self.choose('~~~~++-%')} {self.expression(depth)})"

    def compare(self, depth: int) -> str:
        return (
            f"({self.expression(depth)} {self.choose(['==', '==', '!=', 'in', 'not in', '<'])}"
            f" {self.expression(depth)})"
        )

    def logic(self, depth: int) -> str:
        return (
            f"({self.choose(['', 'not '])}{self.expression(depth)} {self.choose(['and', 'or'])}"
            f" {self.expression(depth)})"
        )

    def choice(self, depth: int) -> str:
        otherwise = f" else {self.expression(depth)}" if self.random.random() < 0.8 else ""
        return f"({self.expression(depth)} if {self.expression(depth)}{otherwise})"

    def filter(self, depth: int) -> str:
        return (
            f"({self.expression(depth)}{self.choose(['', ' | string'])} | {self.choose(FILTERS)})"
        )

    def test(self, depth: int) -> str:
        return f"({self.expression(depth)} is {self.choose(['', 'not '])}{self.choose(TESTS)})"

    def method(self, depth: int) -> str:
        owner = self.expression(depth)
        return (
            f"({owner} | string){self.choose(METHODS)}"
            if self.random.random() < 0.7
            else f"{owner}{self.choose(METHODS)}"
        )

    def call(self, depth: int) -> str:
        inner = self.expression(depth)
        return self.choose(
            [
                f"mac({inner})",
                f"mac(q={inner})",
                f"other(x, {inner})",
                f"[{inner}, x]",
                f"{{'a': {inner}}}",
            ]
        )
