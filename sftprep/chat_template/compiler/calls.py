"""Translation of calls, filters and tests to Python source."""

from __future__ import annotations

from collections.abc import Callable

from jinja2 import nodes

from sftprep.chat_template.compiler.allowlist import (
    FUNCTIONS,
    METHODS,
    SHORT_TESTS,
    TESTS,
    TEXT_FILTERS,
    TEXT_KEEPING_FILTERS,
    TEXT_METHODS,
    first_argument_of,
    is_keyword_argument,
    is_known_filter,
    is_nonempty_text,
    is_safe_to_skip,
)
from sftprep.chat_template.compiler.analysis import has_arguments, namespace_keys
from sftprep.chat_template.compiler.context import TranslationContext
from sftprep.chat_template.compiler.fragments import Code, Kind
from sftprep.chat_template.compiler.runtime import join_by, replace
from sftprep.chat_template.reference.growth_limits import SHORT

_GUARDS: dict[str, Callable[..., object]] = {"replace": replace, "join": join_by}
"""Methods that may make a huge value of two short ones, with the functions that prevent it."""


class CallTranslator(TranslationContext):
    """The translator of calls, filters and tests."""

    def namespace(self, node: nodes.Call) -> Code:
        """Return the source of a `namespace(...)`: a dictionary.

        It never leaves its variable.
        """
        pairs = [
            f"{argument.key!r}: {self.expression(argument.value).source}"
            for argument in node.kwargs
        ]
        return Code(f"{{{', '.join(pairs)}}}")

    def is_namespace(self, node: nodes.Node) -> bool:
        """Return whether an expression creates a namespace."""
        return namespace_keys(node) is not None and self.is_input("namespace")

    def _call(self, node: nodes.Call) -> Code:
        is_plain = node.dyn_args is None and node.dyn_kwargs is None
        if is_plain and isinstance(node.node, nodes.Name):
            return self._call_name(node, node.node.name)
        if is_plain and isinstance(node.node, nodes.Getattr):
            return self._call_method(node, node.node.node, node.node.attr)
        return self.only_jinja(node, "this kind of call")

    def _call_method(self, node: nodes.Call, owner: nodes.Node, method: str) -> Code:
        value = self.expression(owner)
        # A number would need brackets, and it has no such method.
        if method not in METHODS or (isinstance(owner, nodes.Const) and value.literal is None):
            return self.only_jinja(node, f"a call of .{method}")
        source = f"{value.source}.{method}({self._arguments(node)})"
        guard = _GUARDS.get(method)
        if guard is not None and not self._repeats_only_short_text(node, method, value):
            if node.kwargs:
                return self.only_jinja(node, f"a call of .{method} with names")
            self.globals[f"guarded_{method}"] = guard
            source = f"guarded_{method}({value.source}, {self._arguments(node)})"
        kind = self.text_kind(value)
        if method in TEXT_METHODS:
            return Code(source, kind)
        # With a separator that is not empty, `split` returns at least one string.
        is_split = (
            method in {"split", "rsplit"}
            and len(node.args) == 1
            and not node.kwargs
            and is_nonempty_text(node.args[0])
        )
        return Code(source, "texts" if is_split and kind == "text" else "value")

    def _repeats_only_short_text(self, node: nodes.Call, method: str, value: Code) -> bool:
        """Return whether `replace` or `join` repeats only a short constant."""
        if method == "join":
            return value.literal is not None and len(value.literal) <= SHORT
        new = node.args[1] if len(node.args) > 1 else None
        return (
            isinstance(new, nodes.Const) and isinstance(new.value, str) and len(new.value) <= SHORT
        )

    def _call_name(self, node: nodes.Call, name: str) -> Code:
        is_input = self.is_input(name)
        if name in self.analysis.macros and not is_input:
            return self._call_macro(node, name)
        if not is_input or name not in FUNCTIONS:
            return self.only_jinja(node, f"a call of {name}")
        if name == "raise_exception":
            return Code("fall_back('raise_exception')")
        self.globals[f"call_{name}"] = self.environment.globals[name]
        return Code(f"call_{name}({self._arguments(node)})")

    def _call_macro(self, node: nodes.Call, name: str) -> Code:
        macro = self.macros.get(self.symbols.ref(name))
        if (
            macro is None
            or len(node.args) > len(macro.parameters)
            or any(argument.key not in macro.parameters for argument in node.kwargs)
        ):
            return self.only_jinja(node, f"this call of {name}")
        arguments = [self.expression(argument).source for argument in node.args]
        # All arguments are passed by position: the parameters of the Python function have other
        # names than those in the template.
        by_index = {
            macro.parameters.index(argument.key): self.expression(argument.value).source
            for argument in node.kwargs
        }
        if any(index < len(arguments) for index in by_index):
            return self.only_jinja(node, f"this call of {name}")
        for index in range(len(arguments), max(by_index, default=-1) + 1):
            arguments.append(by_index.get(index, "MISSING"))
        return Code(f"{macro.function}({', '.join(arguments)})", "text")

    def _filter(self, node: nodes.Filter) -> Code:
        if not is_known_filter(node):
            return self.only_jinja(node, f"the filter {node.name}")
        value = self.expression(node.node)
        inlined = self._inline_filter(node, value)
        if inlined is not None:
            return inlined
        function = self.environment.filters[node.name]
        self.globals[f"filter_{node.name}"] = function
        arguments = ", ".join(
            part
            for part in (first_argument_of(function), value.source, self._arguments(node))
            if part
        )
        kind: Kind = "text" if node.name in TEXT_FILTERS else "value"
        if node.name in TEXT_KEEPING_FILTERS:
            kind = self.text_kind(value)
        return Code(f"filter_{node.name}({arguments})", kind)

    def _inline_filter(self, node: nodes.Filter, value: Code) -> Code | None:
        """Translate a filter without a call of Jinja's function, if possible."""
        source = ""
        kind: Kind = self.text_kind(value)
        if node.name in {"default", "d"} and len(node.args) == 1 and not node.kwargs and value.atom:
            if is_safe_to_skip(node.args[0]):
                default = self.expression(node.args[0]).source
                source = f"({default} if {value.source} is U else {value.source})"
                kind = "value"
        elif has_arguments(node):
            return None
        elif node.name == "trim" and value.atom:
            source = (
                f"({value.source}.strip() if type({value.source}) is str else trim({value.source}))"
            )
        elif node.name == "trim":
            source = f"{value.source}.strip()" if value.kind == "text" else f"trim({value.source})"
        elif node.name in {"length", "count"}:
            source, kind = f"len({value.source})", "int"
        elif node.name == "string" and kind == "text":
            source = f"text({value.source})"
        return Code(source, kind) if source else None

    def _test(self, node: nodes.Test) -> Code:
        if node.dyn_args is not None or node.dyn_kwargs is not None or node.name not in TESTS:
            return self.only_jinja(node, f"the test {node.name}")
        if node.name in {"defined", "undefined"} and isinstance(node.node, nodes.Name):
            name = node.node.name
            # Jinja's globals are always defined.
            if self.is_input(name) and name in self.environment.globals:
                return Code(repr(node.name == "defined"))
        value = self.expression(node.node)
        if value.literal is not None or isinstance(node.node, nodes.Const):
            return self.only_jinja(node, "a test of a constant")
        if node.name in SHORT_TESTS and not has_arguments(node):
            return Code(SHORT_TESTS[node.name].format(value.source))
        self.globals[f"test_{node.name}"] = self.environment.tests[node.name]
        arguments = self._arguments(node)
        return Code(f"test_{node.name}({value.source}{', ' + arguments if arguments else ''})")

    def _arguments(self, node: nodes.Call | nodes.Filter | nodes.Test) -> str:
        sources = [self.expression(argument).source for argument in node.args]
        for argument in node.kwargs:
            if is_keyword_argument(argument.key):
                sources.append(f"{argument.key}={self.expression(argument.value).source}")
            else:
                sources.append(self.only_jinja(node, f"the argument {argument.key}").source)
        return ", ".join(sources)
