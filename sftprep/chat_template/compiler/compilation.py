"""Compilation of a chat template to one Python function.

The function appends pieces of text to a list.

Idea: most of the time that Jinja spends on a chat template is not spent on the template's own work,
but on what Jinja does for the general case: lookups through the sandbox, a context, loop objects,
generators. A function without these returns the same text faster.

1. `analysis.py` determines properties of the names in the syntax tree.
2. `statements.py` and `expressions.py` translate the tree, statement by statement. Jinja's own
   analysis of scopes determines which name refers to which variable.
3. The source is compiled once for each template, whatever the conversations look like.

The function is exact, or it leaves the conversation to Jinja: where a conversation reaches anything
outside the translated part, or anything at all is raised, Jinja renders that conversation. It is
safe for templates from unknown authors: only names made by the compiler, constants through `repr`,
and operations from `allowlist.py` become part of the source.

Cost: one compilation for each template and process. The slow reference is
`reference/rendering.py`; tests/chat_template compares random templates and all known ones with it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import CodeType
from typing import Any, NamedTuple

import jinja2
from jinja2 import nodes

from sftprep.chat_template.compiler import runtime
from sftprep.chat_template.compiler.analysis import analyze_template, names_with_anchors
from sftprep.chat_template.compiler.expressions import ExpressionTranslator
from sftprep.chat_template.compiler.statements import StatementTranslator
from sftprep.chat_template.reference.sandbox import ChatEnvironment
from sftprep.core.types import Message


class RenderedPieces(NamedTuple):
    """A conversation as a compiled template writes it.

    In `marks` and `turns`, a position is two entries: a number of pieces, and the number of anchors
    in these pieces.

    Example:
        "<|im_start|>user\\n{{ m.content }}<|im_end|>"  ->
        pieces = ["<|im_start|>user\\n", "hi", "<|im_end|>"], and anchors = 2 if the two special
        tokens are anchors
    """

    text: str  # the joined pieces
    pieces: list[str]  # constants and contents, in order
    anchors: int  # number of anchors that the template itself wrote
    marks: list[int]  # start and end of each `{% generation %}` block; two positions for each
    # The marks of turn_tracking.py, four entries for each: a position, the depth and the item.
    turns: list[Any]
    messages: list[Message]  # the messages as the template saw them


RenderFunction = Callable[[list[dict[str, Any]], Any, bool, Mapping[str, Any]], RenderedPieces]
"""Arguments: messages, tools, add_generation_prompt, the other variables."""


@dataclass(frozen=True, slots=True)
class CompiledTemplate:
    """A compiled template."""

    render: RenderFunction
    source: str  # Python
    constructs: tuple[str, ...]  # parts that are left to Jinja, with their lines in the template


_RUNTIME_NAMES: dict[str, object] = {
    "U": runtime.UNDEFINED,
    "MISSING": runtime.MISSING,
    "fall_back": runtime.fall_back,
    "attr": runtime.attr,
    "attr_of_mapping": runtime.attr_of_mapping,
    "item": runtime.item,
    "exact": runtime.exact,
    "trim": runtime.trim,
    "text": str,
    "join": "".join,
    "is_filled": runtime.is_filled,
    "size": runtime.size,
    "RenderedPieces": RenderedPieces,
    "new": tuple.__new__,
}
"""Names that every compiled source may use."""


def compile_pieces(
    tree: nodes.Template,
    template: jinja2.Template,
    environment: ChatEnvironment,
    *,
    anchors: Callable[[str], int] = lambda _: 0,
    special: Iterable[str] = (),
) -> CompiledTemplate:
    """Compile a chat template.

    Args:
        tree: The syntax tree.
        template: The same template, compiled by Jinja.
        environment: The environment of the template.
        anchors: Returns the number of anchors in a string.
        special: Names of the variables that hold a special token.

    Returns:
        A function that raises JinjaFallback, or any other exception, for a conversation that Jinja
        has to render.

    Raises:
        SyntaxError, RecursionError, MemoryError: The template is nested too deeply for Python.
    """
    analysis = analyze_template(tree)
    special_names = frozenset(special) - analysis.assigned
    expressions = ExpressionTranslator(
        analysis,
        environment,
        special=special_names,
        with_anchors=names_with_anchors(tree, analysis.assigned, special_names, anchors),
    )
    source = StatementTranslator(expressions, anchors).function(tree)
    names: dict[str, object] = {
        **_RUNTIME_NAMES,
        "CONTEXT": template.new_context(),
        "anchors_in": lambda value: anchors(value) if type(value) is str else 0,
        **expressions.globals,
    }
    with warnings.catch_warnings():
        # Unusual templates become unusual Python, such as an index into a constant. It raises an
        # error when it is reached, as it does in Jinja.
        warnings.simplefilter("ignore", SyntaxWarning)
        code = compile(source, "<chat template>", "exec")
    return CompiledTemplate(
        render=_load_function(code, names),
        source=source,
        constructs=tuple(dict.fromkeys(expressions.constructs)),
    )


def _load_function(code: CodeType, names: dict[str, object]) -> Any:
    exec(code, names)
    return names["render"]
