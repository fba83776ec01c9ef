"""Analysis of a whole chat template, before one statement of it is compiled."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from jinja2 import nodes

_MARKUP_FILTERS = frozenset({"safe"})
"""Compiled filters that return `Markup`, which escapes what is added to it."""


@dataclass(frozen=True, slots=True)
class TemplateAnalysis:
    """The properties of the names in a template.

    They are determined by name and not by scope, so they hold for each variable of a name.
    """

    # Names whose value is always a `namespace(...)`, with the attributes that it has initially.
    namespaces: dict[str, frozenset[str]]
    macros: frozenset[str]  # names whose value is always one macro
    has_markup: bool  # whether a value may be `Markup`
    assigned: frozenset[str]  # names that get their values only by a plain `set name = ...`


def analyze_template(template: nodes.Template) -> TemplateAnalysis:
    """Analyze a syntax tree."""
    namespaces: dict[str, frozenset[str]] = {}
    namespace_targets: set[int] = set()  # ids of the nodes that a namespace is assigned to
    for assign in template.find_all(nodes.Assign):
        if (
            isinstance(assign.target, nodes.Name)
            and (keys := namespace_keys(assign.node)) is not None
        ):
            name = assign.target.name
            namespace_targets.add(id(assign.target))
            # Only attributes that each of the namespaces has are known to exist.
            namespaces[name] = namespaces[name] & keys if name in namespaces else keys
    num_stores = Counter(
        node.name
        for node in template.find_all(nodes.Name)
        if node.ctx != "load" and id(node) not in namespace_targets
    )
    num_macros = Counter(node.name for node in template.find_all(nodes.Macro))
    num_plain_assignments = Counter(
        assign.target.name
        for assign in template.find_all(nodes.Assign)
        if isinstance(assign.target, nodes.Name) and id(assign.target) not in namespace_targets
    )
    return TemplateAnalysis(
        namespaces={
            name: keys
            for name, keys in namespaces.items()
            if not num_stores[name] and not num_macros[name]
        },
        macros=frozenset(
            name
            for name, count in num_macros.items()
            if count == 1 and not num_stores[name] and name not in namespaces
        ),
        has_markup=_makes_markup(template),
        assigned=frozenset(
            name
            for name, count in num_stores.items()
            if count == num_plain_assignments[name]
            and not num_macros[name]
            and name not in namespaces
        ),
    )


def namespace_keys(node: nodes.Node) -> frozenset[str] | None:
    """Return the attributes created by a call of `namespace` with keywords.

    Return None for any other expression.
    """
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


def names_with_anchors(
    template: nodes.Template,
    assigned: frozenset[str],
    special: frozenset[str],
    count_anchors: Callable[[str], int],
) -> frozenset[str]:
    """Return the variables with a possible anchor of the template in their value.

    Args:
        template: The syntax tree.
        assigned: As in `TemplateAnalysis`; other names are not considered.
        special: Names of the variables that hold a special token.
        count_anchors: Returns the number of anchors in a string.
    """
    values = [
        (assign.target.name, assign.node)
        for assign in template.find_all(nodes.Assign)
        if isinstance(assign.target, nodes.Name) and assign.target.name in assigned
    ]
    found: set[str] = set()
    # Anchors spread from name to name. Each round finds at least one more name, or is the last.
    for _ in values:
        new = {
            name
            for name, value in values
            if any(
                (
                    (isinstance(part, nodes.Const) and isinstance(part.value, str))
                    and count_anchors(part.value)
                )
                or (isinstance(part, nodes.Name) and part.name in special | found)
                for part in [value, *value.find_all((nodes.Const, nodes.Name))]
            )
        }
        if new <= found:
            break
        found |= new
    return frozenset(found)


def count_field_uses(body: Iterable[nodes.Node], name: str) -> Counter[str]:
    """Count the uses of each field of a variable in a part of a template.

    A use is `name.key` or `name["key"]`.
    """
    counts: Counter[str] = Counter()
    for node in _find_all(body, (nodes.Getattr, nodes.Getitem)):
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
    """Return whether a part of a template assigns to a name, in any scope."""
    if any(
        node.name == name
        for node in _find_all(body, (nodes.Macro,))
        if isinstance(node, nodes.Macro)
    ):
        return True
    return any(
        node.name == name and node.ctx != "load"
        for node in _find_all(body, (nodes.Name,))
        if isinstance(node, nodes.Name)
    )


def operand_of_text_filter(node: nodes.Node) -> nodes.Node | None:
    """Return the operand of `safe` or `string` without arguments, else None.

    These filters have no effect where the value is written to the output at once.
    """
    if (
        isinstance(node, nodes.Filter)
        and node.name in {"safe", "string"}
        and node.node is not None
        and not has_arguments(node)
    ):
        return node.node
    return None


def has_arguments(node: nodes.Filter | nodes.Test | nodes.Call) -> bool:
    """Return whether a filter, test or call has arguments."""
    return bool(
        node.args or node.kwargs or node.dyn_args is not None or node.dyn_kwargs is not None
    )


def _makes_markup(template: nodes.Template) -> bool:
    """Return whether a filter returns `Markup` anywhere but directly in the output."""
    harmless: set[int] = set()  # ids of the nodes whose value is written to the output at once
    written = [node for output in template.find_all(nodes.Output) for node in output.nodes]
    written += [node for concat in template.find_all(nodes.Concat) for node in concat.nodes]
    for node in written:
        operand: nodes.Node | None = node
        while operand is not None:
            harmless.add(id(operand))
            operand = operand_of_text_filter(operand)
    return any(
        node.name in _MARKUP_FILTERS and id(node) not in harmless
        for node in template.find_all(nodes.Filter)
    )


def _find_all(
    body: Iterable[nodes.Node], kinds: tuple[type[nodes.Node], ...]
) -> Iterator[nodes.Node]:
    for node in body:
        if isinstance(node, kinds):
            yield node
        yield from node.find_all(kinds)
