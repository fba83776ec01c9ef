"""What must be known of a whole chat template before one statement of it is compiled."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from jinja2 import nodes

MARKUP_FILTERS = frozenset({"safe"})
"""Compiled filters that give `Markup`, which escapes what is added to it."""


@dataclass(frozen=True, slots=True)
class Facts:
    """namespaces: names that only ever hold a `namespace(...)`, each with the attributes that it
    has from its start; macros: names that only ever hold one macro; markup: whether a value may be
    `Markup`; assigned: names that only ever get a value by a plain `set name = ...`."""

    namespaces: dict[str, frozenset[str]]
    macros: frozenset[str]
    markup: bool
    assigned: frozenset[str]


def facts_of(template: nodes.Template) -> Facts:
    """Read the facts from a syntax tree. They go by name, whatever the scope: they hold for each
    variable of that name."""
    namespaces: dict[str, frozenset[str]] = {}
    as_namespace: set[int] = set()
    for assign in template.find_all(nodes.Assign):
        if (
            isinstance(assign.target, nodes.Name)
            and (keys := namespace_keys(assign.node)) is not None
        ):
            name = assign.target.name
            as_namespace.add(id(assign.target))
            namespaces[name] = namespaces[name] & keys if name in namespaces else keys
    stores = Counter(
        node.name
        for node in template.find_all(nodes.Name)
        if node.ctx != "load" and id(node) not in as_namespace
    )
    macros = Counter(node.name for node in template.find_all(nodes.Macro))
    plain = Counter(
        assign.target.name
        for assign in template.find_all(nodes.Assign)
        if isinstance(assign.target, nodes.Name) and id(assign.target) not in as_namespace
    )
    return Facts(
        namespaces={
            name: keys for name, keys in namespaces.items() if not stores[name] and not macros[name]
        },
        macros=frozenset(
            name
            for name, times in macros.items()
            if times == 1 and not stores[name] and name not in namespaces
        ),
        markup=_makes_markup(template),
        assigned=frozenset(
            name
            for name, times in stores.items()
            if times == plain[name] and not macros[name] and name not in namespaces
        ),
    )


def namespace_keys(node: nodes.Node) -> frozenset[str] | None:
    """Attributes that a call of `namespace` with keywords gives; None for any other expression."""
    if (
        not isinstance(node, nodes.Call)
        or not isinstance(node.node, nodes.Name)
        or node.node.name != "namespace"
    ):
        return None
    if node.args or node.dyn_args is not None or node.dyn_kwargs is not None:
        return None
    keys = [keyword.key for keyword in node.kwargs]
    return None if any(key.startswith("_") for key in keys) else frozenset(keys)


def uses_of_fields(body: Iterable[nodes.Node], name: str) -> Counter[str]:
    """How often each field `name.key` or `name["key"]` is written in a piece of template."""
    counts: Counter[str] = Counter()
    for node in _all(body, (nodes.Getattr, nodes.Getitem)):
        if (
            isinstance(node, nodes.Getattr | nodes.Getitem)
            and isinstance(node.node, nodes.Name)
            and node.node.name == name
        ):
            if isinstance(node, nodes.Getattr):
                counts[node.attr] += 1
            elif isinstance(node.arg, nodes.Const) and isinstance(node.arg.value, str):
                counts[node.arg.value] += 1
    return counts


def stores_name(body: Iterable[nodes.Node], name: str) -> bool:
    """Whether a piece of template assigns to a name, in whatever scope."""
    if any(
        node.name == name for node in _all(body, (nodes.Macro,)) if isinstance(node, nodes.Macro)
    ):
        return True
    return any(
        node.name == name and node.ctx != "load"
        for node in _all(body, (nodes.Name,))
        if isinstance(node, nodes.Name)
    )


def shown_filter(node: nodes.Node) -> nodes.Node | None:
    """The operand of `safe` or `string` without arguments, which change nothing where the value
    becomes text at once."""
    if (
        isinstance(node, nodes.Filter)
        and node.name in {"safe", "string"}
        and node.node is not None
        and not has_arguments(node)
    ):
        return node.node
    return None


def has_arguments(node: nodes.Filter | nodes.Test | nodes.Call) -> bool:
    """Whether a filter, test or call is written with arguments."""
    return bool(
        node.args or node.kwargs or node.dyn_args is not None or node.dyn_kwargs is not None
    )


def _makes_markup(template: nodes.Template) -> bool:
    harmless: set[int] = set()
    written = [node for output in template.find_all(nodes.Output) for node in output.nodes]
    written += [node for concat in template.find_all(nodes.Concat) for node in concat.nodes]
    for node in written:
        shown: nodes.Node | None = node
        while shown is not None:
            harmless.add(id(shown))
            shown = shown_filter(shown)
    return any(
        node.name in MARKUP_FILTERS and id(node) not in harmless
        for node in template.find_all(nodes.Filter)
    )


def _all(body: Iterable[nodes.Node], kinds: tuple[type[nodes.Node], ...]) -> Iterator[nodes.Node]:
    for node in body:
        if isinstance(node, kinds):
            yield node
        yield from node.find_all(kinds)
