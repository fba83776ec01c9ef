"""Chat templates run by Jinja itself, in a sandbox, exactly as transformers runs them: the
reference for the fast way."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from string import Formatter
from types import CodeType
from typing import Any, NamedTuple

import jinja2
from jinja2 import filters, nodes, pass_environment, pass_eval_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, generate_lorem_ipsum

from sftprep.chat_template.reference.growth_limits import (
    HUGE_SIZE,
    METHOD_CHECKS,
    SHORT,
    check_format,
    check_growth,
    check_indent,
    check_join,
    check_replace,
    check_sum,
    check_wordwrap,
)
from sftprep.chat_template.reference.turn_tracking import Mark, note_turns
from sftprep.core.types import Message
from sftprep.errors import TemplateError

REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
"""Names under which data sets carry a turn's reasoning; templates read the first, those of gpt-oss
the second."""

OUTPUT_FLOOR = 1 << 20
"""Characters that any template may write, however small its input."""
OUTPUT_RATIO = 64
"""Characters that a template may write for each character of its input, beyond the floor."""


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's immutable sandbox with what chat templates expect: `generation`, `tojson`,
    `raise_exception`, `strftime_now`.

    Operations that would make a huge value in one step raise SecurityError. Growth in many small
    steps, and time, have no limit.
    """

    intercepted_binops = frozenset({"*", "**", "%"})

    def __init__(self, date: datetime.date) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols]
        )
        self.filters["tojson"] = tojson
        self.filters.update(
            {name: _with_small_numbers(self.filters[name]) for name in _PADDING_FILTERS}
        )
        self.filters["format"] = _with_small_widths(self.filters["format"])
        self.filters["replace"] = _replace
        self.filters["join"] = _join
        self.filters["sum"] = _sum
        self.filters["indent"] = _with_check(self.filters["indent"], check_indent, 0)
        self.filters["wordwrap"] = _with_check(self.filters["wordwrap"], check_wordwrap, 1)
        self.globals["raise_exception"] = raise_exception
        self.globals["strftime_now"] = _frozen_clock(date)
        self.globals["dict"] = _Dict()
        self.globals["namespace"] = _ChatNamespace
        self.globals["lipsum"] = _with_small_numbers(_lipsum)

    @property
    def generation(self) -> GenerationTag:
        """The extension that notes where `generation` blocks stand."""
        tag = self.extensions[GenerationTag.identifier]
        assert isinstance(tag, GenerationTag)
        return tag

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Run `*`, `**` or `%`. Raises SecurityError where the result could be huge."""
        if _is_huge(operator, left, right):
            raise SecurityError(f"the chat template makes a huge value with {operator!r}")
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """Call what a template calls. Raises SecurityError for padding to a huge width, and for
        strings that would be multiplied."""
        name = getattr(__obj, "__name__", None)
        if name in _PADDING_METHODS:
            _check_small((args, kwargs))
        text = getattr(__obj, "__self__", None)
        if isinstance(text, str):
            if name == "join" and len(args) == 1:
                args = (_as_items(args[0]),)
                check_join(text, args[0])
            elif name in METHOD_CHECKS:
                named = {key: kwargs[key] for key in kwargs if key not in _ADDED_ARGUMENTS}
                METHOD_CHECKS[name](text, *args, **named)
        return super().call(__context, __obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """The sandboxed `str.format`, which refuses huge widths too."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        fields = 0
        for _, name, layout, _ in Formatter().parse(value.__self__):
            fields += name is not None
            if layout and ("{" in layout or _LARGE_NUMBER.search(layout)):
                raise SecurityError(
                    "the chat template formats to a width that it computes, or a huge one"
                )
        if fields <= SHORT:
            return wrapped

        def checked(*args: Any, **kwargs: Any) -> str:
            check_format(value.__self__, fields, [*args, kwargs], size_of)
            return wrapped(*args, **kwargs)

        return checked


class GenerationTag(Extension):
    """`{% generation %} ... {% endgeneration %}`: what the assistant wrote. Notes the range of each
    block in the output.

    Only one render at a time may use it: `start` begins one, `written` is kept by whoever collects
    the output.
    """

    tags = {"generation"}  # noqa: RUF012  (the way Jinja's extensions declare their tags)

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        self.start()

    def start(self) -> None:
        """Forget the spans of the render before."""
        self.spans: list[tuple[int, int]] = []
        self.turns: list[Mark] = []
        self.written = 0

    def parse(self, parser: Parser) -> nodes.CallBlock:
        """Turn the tag into a call of `_note` around its body."""
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
    """Whether a node of a template is a `generation` block."""
    return (
        isinstance(node, nodes.CallBlock)
        and isinstance(node.call.node, nodes.ExtensionAttribute)
        and node.call.node.identifier == GenerationTag.identifier
    )


class Parsed(NamedTuple):
    """A chat template, read. marks: whether it has `generation` blocks.

    writes: whether it may change what it is given: Jinja 3.1 lets `{% set message.role %}...{%
    endset %}` write into a dictionary, where `{% set message.role = 1 %}` fails.
    """

    tree: nodes.Template
    template: jinja2.Template
    marks: bool
    writes: bool


def compile_template(environment: ChatEnvironment, source: str, *, turns: bool = False) -> Parsed:
    """Parse and compile a chat template; turns: its loops note the message that they are at.

    Raises TemplateError, with the line where Jinja tells it.
    """
    remedy = "correct the chat template, or give another with --chat-template"
    try:
        tree, code = _compiled(source, turns)
        return Parsed(
            tree,
            jinja2.Template.from_code(environment, code, environment.make_globals(None)),
            marks=any(is_generation(node) for node in tree.find_all(nodes.CallBlock)),
            writes=any(
                isinstance(node.target, nodes.NSRef | nodes.Tuple)
                for node in tree.find_all(nodes.AssignBlock)
            ),
        )
    except jinja2.TemplateSyntaxError as error:
        raise TemplateError(
            f"line {error.lineno} of the chat template: {error.message}", remedy=remedy
        ) from error
    except (
        jinja2.TemplateError,
        SyntaxError,
        ValueError,
        OverflowError,
        RecursionError,
        MemoryError,
    ) as error:
        raise TemplateError(
            f"the chat template does not compile: {type(error).__name__}: {error}", remedy=remedy
        ) from error


# A build looks whether its template compiles before it needs it; no environment has anything of its
# own in the code.
@lru_cache(maxsize=4)
def _compiled(source: str, turns: bool) -> tuple[nodes.Template, CodeType]:
    environment = ChatEnvironment(datetime.date.min)
    tree = environment.parse(source)
    if turns:
        note_turns(tree, environment, GenerationTag.identifier)
    return tree, environment.compile(tree)


def run_template(
    environment: ChatEnvironment, template: jinja2.Template, variables: Mapping[str, Any]
) -> tuple[str, tuple[tuple[int, int], ...]]:
    """Render with Jinja: the text, and the character ranges of its `generation` blocks.

    Raises TemplateError with the template's own message where it refuses the conversation, and for
    whatever else goes wrong.
    """
    tag = environment.generation
    tag.start()
    blocks: list[str] = []
    try:
        for block in template.generate(variables):
            blocks.append(block)
            tag.written += len(block)
            if tag.written > OUTPUT_FLOOR:
                check_output(tag.written, variables)
    except TemplateError:
        raise
    except Exception as error:
        # A template is a program written by strangers: it may raise anything, and each is a fault
        # of this conversation.
        own = type(error) is jinja2.TemplateError
        message = str(error) if own else f"{type(error).__name__}: {error}"
        absent = _SPECIAL_NAME.search(message) if isinstance(error, jinja2.UndefinedError) else None
        if absent is not None and absent[1] not in variables:
            message += f": the tokenizer has no such token, and the template writes its {absent[1]}"
        raise TemplateError(
            f"the chat template refuses the conversation: {message}",
            remedy=(
                "change the record to what the template takes, or give another template with"
                " --chat-template"
            ),
        ) from error
    return "".join(blocks), tuple(tag.spans)


_SPECIAL_NAME = re.compile(r"'((?:bos|eos|unk|sep|pad|cls|mask)_token)' is undefined")


def check_output(written: int, variables: Mapping[str, Any]) -> None:
    """Refuse an output far larger than its input. Raises TemplateError."""
    limit = OUTPUT_FLOOR + OUTPUT_RATIO * size_of(variables)
    if written > limit:
        raise TemplateError(
            f"the chat template writes more than {limit} characters for this conversation",
            remedy="check the chat template: it writes far more than it is given",
        )


def size_of(value: Any) -> int:
    """Characters in all strings of plain JSON data."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(len(str(key)) + size_of(item) for key, item in value.items())
    if isinstance(value, Sequence):
        return sum(size_of(item) for item in value)
    return 8


def as_templates_get(messages: list[Message]) -> list[Message]:
    """Messages without keys whose value is None, and a turn's reasoning under the names that
    templates read; the same list where there is nothing to do. Source: `apply_chat_template` of
    transformers 5.23.

    Raises TemplateError for a message that is no dictionary.
    """
    shown = messages
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            raise TemplateError(
                f"message {index + 1} is a {type(message).__name__}, not an object",
                remedy='write each message as {"role": ..., "content": ...}',
            )
        if None in message.values():
            if shown is messages:
                shown = list(messages)
            message = {key: value for key, value in message.items() if value is not None}  # noqa: PLW2901
            shown[index] = message
        if "reasoning_content" in message or "thinking" in message or "reasoning" in message:
            reasoning = next(
                (message[key] for key in REASONING_KEYS if message.get(key) is not None), None
            )
            if reasoning is not None:
                if shown is messages:
                    shown = list(messages)
                shown[index] = {"thinking": reasoning, **message, "reasoning_content": reasoning}
    return shown


def tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The `tojson` of chat templates: plain JSON, where Jinja's own escapes HTML. Raises
    SecurityError for a huge indent, or long separators."""
    if not (ensure_ascii or indent is not None or separators is not None or sort_keys):
        return _PLAIN_JSON(value)
    _check_small(indent)
    for text in (indent, *(separators or ())):
        if isinstance(text, str) and len(text) > SHORT:
            raise SecurityError("the chat template asks for JSON with long separators")
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def raise_exception(message: str) -> None:
    """What a template calls to refuse a conversation. Raises jinja2.TemplateError."""
    raise jinja2.TemplateError(message)


class _Dict:
    """`dict` for templates: makes dictionaries, and gives no way to the type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args, **kwargs)


class _ChatNamespace(Namespace):
    """`namespace` for templates: names with a leading underscore are refused, which would reach
    into Python."""

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


_PLAIN_JSON = json.JSONEncoder(ensure_ascii=False).encode
_ADDED_ARGUMENTS = frozenset({"_loop_vars", "_block_vars"})
"""What compiled templates of Jinja add to each call in a loop or block."""
_PADDING_METHODS = frozenset({"center", "ljust", "rjust", "zfill", "expandtabs"})
_PADDING_FILTERS = ("center", "indent", "batch", "slice", "wordwrap")
_SMALL = 10_000
_LARGE_NUMBER = re.compile(r"\d{5,}")
_LARGE_PERCENT = re.compile(r"%[^a-zA-Z%]*(\d{5,}|\*)")


def _frozen_clock(date: datetime.date) -> Callable[[str], str]:
    midnight = datetime.datetime.combine(date, datetime.time())

    def strftime_now(format: str) -> str:
        return midnight.strftime(format)

    return strftime_now


def _check_attribute(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(
            f"chat templates cannot store the attribute {name!r} on a namespace: it starts with an"
            " underscore"
        )


def _with_small_numbers(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same filter or function, refusing large numbers as arguments."""

    def checked(*args: Any, **kwargs: Any) -> Any:
        _check_small((args, kwargs))
        return function(*args, **kwargs)

    # Jinja tells by this mark whether the function wants the environment or the context first.
    if hasattr(function, "jinja_pass_arg"):
        checked.jinja_pass_arg = function.jinja_pass_arg  # type: ignore[attr-defined]
    return checked


def _with_check(
    function: Callable[..., Any], check: Callable[..., None], passed: int
) -> Callable[..., Any]:
    """The same filter after a check of what it gets. passed: arguments that Jinja puts first."""

    def checked(*args: Any, **kwargs: Any) -> Any:
        check(*args[passed:], **kwargs)
        return function(*args, **kwargs)

    if hasattr(function, "jinja_pass_arg"):
        checked.jinja_pass_arg = function.jinja_pass_arg  # type: ignore[attr-defined]
    return checked


@pass_eval_context
def _replace(
    context: nodes.EvalContext, s: Any, old: Any, new: Any, count: int | None = None
) -> str:
    check_replace(s, old, new, count)
    return filters.do_replace(context, s, old, new, count)


@pass_eval_context
def _join(
    context: nodes.EvalContext, value: Any, d: Any = "", attribute: str | int | None = None
) -> str:
    if attribute is not None:
        value = map(filters.make_attrgetter(context.environment, attribute), value)
    items = _as_items(value)
    check_join(d, items)
    return filters.sync_do_join(context, items, d)


@pass_environment
def _sum(
    environment: jinja2.Environment,
    iterable: Any,
    attribute: str | int | None = None,
    start: Any = 0,
) -> Any:
    if isinstance(start, list | tuple):
        if attribute is not None:
            iterable = map(filters.make_attrgetter(environment, attribute), iterable)
        iterable, attribute = list(iterable), None
        check_sum(iterable, start)
    return filters.sync_do_sum(environment, iterable, attribute, start)


def _lipsum(n: int = 5, html: bool = True, min: int = 20, max: int = 100) -> str:
    check_growth("lipsum", 8 * n * max, 0)
    return generate_lorem_ipsum(n, html, min, max)


def _as_items(value: Any) -> Any:
    """An iterable that can be gone through again."""
    if type(value) in (list, str, tuple):  # the usual ones, without the slower test
        return value
    return value if isinstance(value, str | Sequence | Mapping) else list(value)


def _with_small_widths(function: Callable[..., str]) -> Callable[..., str]:
    """The `format` filter, refusing large widths."""

    def checked(value: Any, *args: Any, **kwargs: Any) -> str:
        if _LARGE_PERCENT.search(str(value)):
            raise SecurityError("the chat template formats to a huge width")
        check_format(str(value), str(value).count("%"), [*args, kwargs], size_of)
        return function(value, *args, **kwargs)

    return checked


def _check_small(value: Any) -> None:
    if isinstance(value, int) and abs(value) > _SMALL:
        raise SecurityError(f"the chat template asks for a width of {value}")
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, tuple):
        for item in value:
            _check_small(item)


def _is_huge(operator: str, left: Any, right: Any) -> bool:
    if operator == "%":
        if not isinstance(left, str):
            return False
        check_format(left, left.count("%"), right, size_of)
        return _LARGE_PERCENT.search(left) is not None
    if operator == "**":
        return (
            isinstance(left, int)
            and isinstance(right, int)
            and left.bit_length() * right > HUGE_SIZE
        )
    if isinstance(left, int) and isinstance(right, int):
        return left.bit_length() + right.bit_length() > HUGE_SIZE
    size, count = (left, right) if isinstance(right, int) else (right, left)
    return isinstance(count, int) and hasattr(size, "__len__") and len(size) * count > HUGE_SIZE
