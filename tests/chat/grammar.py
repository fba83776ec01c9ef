"""Random chat templates: small programs that mix everything the compiled way knows, and some that it does not."""

from __future__ import annotations

import random

_NAMES = ["messages", "tools", "x", "y", "m", "p", "bos_token", "given", "absent", "add_generation_prompt", "content"]
_KEYS = ["role", "content", "name", "a", "b", "items", "title", "tool_calls"]
_TEXTS = ["'a'", "''", "'user'", "' b '", "'</think>'", "'<b>'", "'role'", "'\\n'"]
_FILTERS = (
    ["trim", "length", "string", "default('d')", "default(absent.b)", "default('e', true)", "upper", "list", "join(',')", "safe"]
    + ["tojson", "int", "items", "replace('a', '<')", "dictsort", "capitalize", "first", "map('upper')", "reverse", "tojson(indent=1)"]
    + ["selectattr('role', 'equalto', 'user')", "join", "string | trim", "trim('a')", "escape"]
)
_TESTS = ["defined", "undefined", "none", "string", "mapping", "iterable", "sequence", "boolean", "true", "number", "eq('a')", "odd"]
_METHODS = (
    [".strip()", ".split('a')", ".split('</think>')[-1]", ".split('a')[0].rstrip('b')", ".startswith('a')", ".get('role')", ".items()"]
    + [".lstrip('\\n')", ".upper()", ".replace('a', 'b')", ".get('a', 'z')", ".keys()", ".format(1)", ".endswith(y)", ".title()"]
    + ["[0]", "[-1]", "[1:]", "[::-1]", "[:2]", "['role']", "['items']", "[x]", "[loop.index0 - 1]", "[1]"]
)
_LOOP = ["index", "index0", "first", "last", "length", "revindex", "previtem", "nextitem", "cycle"]


class Grammar:
    """Writes one template. What it writes parses; most of it runs."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.in_loop = 0
        self.in_generation = False

    def template(self) -> str:
        head = "{% set ns = namespace(a=1, b='t') %}" if self.random.random() < 0.7 else ""
        if self.random.random() < 0.4:
            head += "{% macro mac(p, q='k') %}" + self.body(1) + "{% endmacro %}"
        return head + self.body(3)

    def body(self, depth: int) -> str:
        return "".join(self.statement(depth) for _ in range(self.random.randint(1, 3)))

    def statement(self, depth: int) -> str:
        pick = self.random.random()
        if depth == 0 or pick < 0.3:
            return "{{ " + self.expression(2) + " }}"
        if pick < 0.36:
            return "data\n"
        if pick < 0.5:
            return "{% set " + self.target() + " = " + self.expression(2) + " %}"
        if pick < 0.54:
            return "{% set ns = namespace(a=" + self.expression(1) + ") %}"
        if pick < 0.72:
            branches = "{% if " + self.expression(2) + " %}" + self.body(depth - 1)
            if self.random.random() < 0.4:
                branches += "{% elif " + self.expression(1) + " %}" + self.body(depth - 1)
            if self.random.random() < 0.5:
                branches += "{% else %}" + self.body(depth - 1)
            return branches + "{% endif %}"
        if pick < 0.9:
            return self.loop(depth)
        if pick < 0.94:
            return "{% set " + self.random.choice(["x", "y", "ns.a"]) + " %}" + self.body(depth - 1) + "{% endset %}"
        if pick < 0.98:
            inside = self.in_loop, self.in_generation
            if self.in_generation and self.random.random() < 0.9:
                return "data"
            self.in_loop, self.in_generation = 0, True
            text = "{% generation %}" + self.body(depth - 1) + "{% endgeneration %}"
            self.in_loop, self.in_generation = inside
            return text
        if self.in_loop:
            return "{% if " + self.expression(1) + " %}{% " + self.random.choice(["break", "continue"]) + " %}{% endif %}"
        return "{% macro mac(p, q=2) %}" + self.body(depth - 1) + "{% endmacro %}"

    def loop(self, depth: int) -> str:
        over = self.random.choice(["messages", "messages", "messages", "m.tool_calls", "messages[::-1]", self.expression(2)])
        name = self.random.choice(["m", "m", "m", "x", "p", "k, v"])
        if name == "k, v":
            over = self.random.choice(["m.items()", "messages[0] | items", "given | dictsort", "given.items()"])
        only = " if " + self.expression(1) if self.random.random() < 0.1 else ""
        self.in_loop += 1
        text = "{% for " + name + " in " + over + only + " %}" + self.body(depth - 1)
        self.in_loop -= 1
        if self.random.random() < 0.05:
            text += "{% else %}none"
        return text + "{% endfor %}"

    def target(self) -> str:
        return self.random.choice(["x", "y", "m", "content", "messages", "ns.a", "ns.b", "ns.c", "x, y", "p"])

    def expression(self, depth: int) -> str:
        choose, pick = self.random.choice, self.random.random()
        if depth == 0 or pick < 0.25:
            return choose([choose(_NAMES), choose(_TEXTS), choose(["0", "1", "2", "true", "false", "none", "[]", "1.5"])])
        if pick < 0.45:
            return choose(["m", "m", "m", "x", "p", "messages[0]", "given"]) + choose([f".{choose(_KEYS)}", f"[{choose(_KEYS)!r}]"])
        if pick < 0.5:
            return "loop." + choose(_LOOP) if self.in_loop else "ns." + choose("abc")
        if pick < 0.55:
            return "ns." + choose("abc")
        if pick < 0.65:
            return f"({self.expression(depth - 1)} {choose(['~', '~', '~', '~', '+', '+', '-', '%'])} {self.expression(depth - 1)})"
        if pick < 0.72:
            return f"({self.expression(depth - 1)} {choose(['==', '==', '!=', 'in', 'not in', '<'])} {self.expression(depth - 1)})"
        if pick < 0.78:
            return f"({self.expression(depth - 1)} {choose(['and', 'or'])} {self.expression(depth - 1)})"
        if pick < 0.82:
            otherwise = f" else {self.expression(depth - 1)}" if self.random.random() < 0.8 else ""
            return f"({self.expression(depth - 1)} if {self.expression(depth - 1)}{otherwise})"
        if pick < 0.9:
            owner = self.expression(depth - 1)
            owner = f"({owner} | string)" if self.random.random() < 0.4 else owner
            return f"({owner} | {choose(_FILTERS)})"
        if pick < 0.94:
            return f"({self.expression(depth - 1)} is {choose(['', 'not '])}{choose(_TESTS)})"
        if pick < 0.98:
            owner = self.expression(depth - 1)
            return f"({owner} | string){choose(_METHODS)}" if self.random.random() < 0.7 else f"{owner}{choose(_METHODS)}"
        return choose(
            [f"mac({self.expression(depth - 1)})", f"mac(q={self.expression(depth - 1)})", f"[{self.expression(depth - 1)}, x]"]
            + [f"{{'a': {self.expression(depth - 1)}}}", f"not {self.expression(depth - 1)}", "range(3)", "raise_exception('no')", "ns"]
        )
