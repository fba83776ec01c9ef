"""The state of one compilation.

It consists of scopes, variables, and what the compiled source needs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from jinja2 import nodes
from jinja2.idtracking import VAR_LOAD_RESOLVE, Symbols

from sftprep.chat_template.compiler.analysis import TemplateAnalysis
from sftprep.chat_template.compiler.fragments import Code, Kind, Loop, Macro
from sftprep.chat_template.reference.sandbox import ChatEnvironment

_ARGUMENTS = frozenset({"messages", "tools", "add_generation_prompt"})
"""Variables of a template that are arguments of the compiled function."""


@dataclass
class TranslationContext(ABC):
    """The shared state of the translations of single nodes."""

    analysis: TemplateAnalysis
    environment: ChatEnvironment
    # The scope in which names are looked up. The translator of statements sets it.
    symbols: Symbols = field(default_factory=Symbols)
    # The running loops that use `loop`, by Jinja's reference of `loop`.
    loops: dict[str, Loop] = field(default_factory=dict)
    # For each loop variable that is known to be a dictionary, by its reference: the fields that are
    # in Python variables.
    fields: dict[str, dict[str, str]] = field(default_factory=dict)
    macros: dict[str, Macro] = field(default_factory=dict)  # by the reference of their name
    # Variables of the caller that the template reads: name -> Python variable.
    inputs: dict[str, str] = field(default_factory=dict)
    # Those of them that hold a special token, which may be an anchor.
    special: frozenset[str] = frozenset()
    # Names of the template's own variables whose anchors are counted with their value.
    with_anchors: frozenset[str] = frozenset()
    # Functions that the source calls, by their names in the source.
    globals: dict[str, object] = field(default_factory=dict)
    constructs: list[str] = field(default_factory=list)  # parts that only Jinja can run
    _name_count: int = 0
    _variables: dict[str, str] = field(default_factory=dict)  # by Jinja's reference

    @abstractmethod
    def expression(self, node: nodes.Node | None) -> Code:
        """Return the source of an expression."""

    def new_name(self, stem: str) -> str:
        """Return an unused Python name."""
        self._name_count += 1
        return f"{stem}{self._name_count}"

    def variable(self, ref: str) -> str:
        """Return the Python variable for one of Jinja's references."""
        if ref not in self._variables:
            self._variables[ref] = self.new_name("v")
        return self._variables[ref]

    def input(self, name: str) -> Code:
        """Return the code of a variable of the caller.

        Jinja's own globals are functions, which compiled code does not use as values.
        """
        if name in _ARGUMENTS:
            return Code(name, atom=True)
        if name not in self.inputs:
            self.inputs[name] = self.new_name("n")
        variable = self.inputs[name]
        anchors = anchor_count(variable) if name in self.special else ""
        return Code(variable, atom=True, anchors=anchors)

    def is_input(self, name: str) -> bool:
        """Return whether a name in this scope is always a variable of the caller."""
        scope: Symbols | None = self.symbols
        while scope is not None and name not in scope.refs:
            scope = scope.parent
        return scope is None or (
            name not in scope.stores
            and scope.loads.get(scope.refs[name]) == (VAR_LOAD_RESOLVE, name)
        )

    def only_jinja(self, node: nodes.Node, what: str) -> Code:
        """Return an expression to fall back to Jinja for the whole conversation."""
        reason = f"{what} (line {node.lineno})"
        self.constructs.append(reason)
        return Code(f"fall_back({reason!r})")

    def text_kind(self, receiver: Code) -> Kind:
        """Return the kind of a string method's or filter's result.

        A method of Markup returns Markup.
        """
        return "value" if self.analysis.has_markup and receiver.kind != "text" else "text"


def anchor_count(variable: str) -> str:
    """Return the name of the variable with the anchor count of another variable."""
    return f"a_{variable}"
