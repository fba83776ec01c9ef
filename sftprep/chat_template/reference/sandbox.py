"""The Jinja environment of chat templates: a sandbox with extensions.

The extensions are those that transformers offers to templates. The environment is the reference
that the compiler is tested against.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Callable
from string import Formatter
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from sftprep.chat_template.reference.checked_filters import (
    checked_filters,
    lipsum,
    to_reiterable,
    with_checked_numbers,
)
from sftprep.chat_template.reference.growth_limits import (
    METHOD_CHECKS,
    SHORT,
    check_format,
    check_join,
    check_numbers,
    is_huge_operation,
)
from sftprep.chat_template.reference.turn_tracking import Mark

_ADDED_ARGUMENTS = frozenset({"_loop_vars", "_block_vars"})
"""Keyword arguments that Jinja's generated code adds to each call in a loop or block."""
_PADDING_METHODS = frozenset({"center", "ljust", "rjust", "zfill", "expandtabs"})
_LARGE_NUMBER = re.compile(r"\d{5,}")
_ENCODE_PLAIN_JSON = json.JSONEncoder(ensure_ascii=False).encode


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's immutable sandbox, with the extensions for chat templates.

    These are `generation`, `tojson`, `raise_exception` and `strftime_now`. Operations that would
    make a huge value in one step raise SecurityError. Growth in many small steps, and the time of a
    render, have no limit here.

    Args:
        date: The date that `strftime_now` returns, so that renders are reproducible.
    """

    intercepted_binops = frozenset({"*", "**", "%"})

    def __init__(self, date: datetime.date) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols]
        )
        # The values that `tojson` wrote, with their JSON, for the check for omissions. A render
        # starts with an empty list.
        self.written_as_json: list[tuple[Any, str]] = []
        self.filters["tojson"] = self._to_recorded_json
        self.filters.update(checked_filters(self.filters))
        self.globals["raise_exception"] = raise_exception
        self.globals["strftime_now"] = _frozen_clock(date)
        self.globals["dict"] = _Dict()
        self.globals["namespace"] = _ChatNamespace
        self.globals["lipsum"] = with_checked_numbers(lipsum)

    def _to_recorded_json(self, value: Any, *args: Any, **kwargs: Any) -> str:
        text = tojson(value, *args, **kwargs)
        self.written_as_json.append((value, text))
        return text

    @property
    def generation(self) -> GenerationTag:
        """Return the extension for `generation` blocks, with their positions."""
        tag = self.extensions[GenerationTag.identifier]
        assert isinstance(tag, GenerationTag)
        return tag

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Run `*`, `**` or `%`.

        Raises:
            SecurityError: The result could be huge.
        """
        if is_huge_operation(operator, left, right):
            raise SecurityError(f"the chat template makes a huge value with {operator!r}")
        return super().call_binop(context, operator, left, right)

    # Jinja's own method has these parameter names, so that no keyword argument of a template can
    # collide with them.
    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a function or method for a template.

        Raises:
            SecurityError: The call would pad to a huge width or multiply strings.
        """
        name = getattr(__obj, "__name__", None)
        if name in _PADDING_METHODS:
            check_numbers((args, kwargs))
        text = getattr(__obj, "__self__", None)
        if isinstance(text, str):
            if name == "join" and len(args) == 1:
                args = (to_reiterable(args[0]),)
                check_join(text, args[0])
            elif name in METHOD_CHECKS:
                keywords = {key: kwargs[key] for key in kwargs if key not in _ADDED_ARGUMENTS}
                METHOD_CHECKS[name](text, *args, **keywords)
        return super().call(__context, __obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Return the sandboxed `str.format` with a check against huge widths."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        num_fields = 0
        for _, name, layout, _ in Formatter().parse(value.__self__):
            num_fields += name is not None
            if layout and ("{" in layout or _LARGE_NUMBER.search(layout)):
                raise SecurityError(
                    "the chat template formats to a width that it computes, or a huge one"
                )
        if num_fields <= SHORT:
            return wrapped

        def checked(*args: Any, **kwargs: Any) -> str:
            check_format(value.__self__, num_fields, [*args, kwargs])
            return wrapped(*args, **kwargs)

        return checked


class GenerationTag(Extension):
    """The tag `{% generation %} ... {% endgeneration %}` around assistants' words.

    It records the range of each block in the output, and the items that loops report
    (`turn_tracking.py`). Only one render at a time may use it: `start` begins a render, and the
    collector of the output keeps `written` up to date.
    """

    tags = {"generation"}  # noqa: RUF012  (Jinja's extensions declare their tags like this)

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        self.start()

    def start(self) -> None:
        """Forget the spans of the previous render."""
        self.spans: list[tuple[int, int]] = []  # characters [first, last) of each block
        self.turns: list[Mark] = []
        self.written = 0  # characters that the template has written so far

    def parse(self, parser: Parser) -> nodes.CallBlock:
        """Parse the tag into a call of `_note` with the block as its caller."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        block = nodes.CallBlock(self.call_method("_note"), [], [], body)
        block.set_lineno(line)
        return block

    def _turn(self, depth: int, item: Any) -> None:
        self.turns.append((self.written, depth, item))

    def _note(self, caller: Callable[[], str]) -> str:
        text = caller()
        self.spans.append((self.written, self.written + len(text)))
        return text


def is_generation(node: nodes.Node) -> bool:
    """Return whether a node of a template is a `generation` block."""
    return (
        isinstance(node, nodes.CallBlock)
        and isinstance(node.call.node, nodes.ExtensionAttribute)
        and node.call.node.identifier == GenerationTag.identifier
    )


def tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return plain JSON; Jinja's own filter of this name escapes HTML.

    Raises:
        SecurityError: The indent is huge, or the separators are long.
    """
    if not (ensure_ascii or indent is not None or separators is not None or sort_keys):
        return _ENCODE_PLAIN_JSON(value)
    check_numbers(indent)
    for text in (indent, *(separators or ())):
        if isinstance(text, str) and len(text) > SHORT:
            raise SecurityError("the chat template asks for JSON with long separators")
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def raise_exception(message: str) -> None:
    """Reject a conversation on behalf of a template.

    Raises:
        jinja2.TemplateError: Always.
    """
    raise jinja2.TemplateError(message)


class _Dict:
    """`dict` for templates, without access to the type itself."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args, **kwargs)


class _ChatNamespace(Namespace):
    """`namespace` for templates, without names with a leading underscore.

    Such names would give access to Python's internals.
    """

    # `self` is taken from args, since namespace(self=...) is allowed in templates.
    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _check_attribute(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)


def _check_attribute(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(
            f"chat templates cannot store the attribute {name!r} on a namespace: it starts with an"
            " underscore"
        )


def _frozen_clock(date: datetime.date) -> Callable[[str], str]:
    midnight = datetime.datetime.combine(date, datetime.time())

    def strftime_now(format: str) -> str:
        return midnight.strftime(format)

    return strftime_now
