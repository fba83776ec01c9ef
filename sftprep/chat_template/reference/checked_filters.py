"""Jinja's filters and functions with limits on the size of their results.

The limits themselves are in `growth_limits.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2
from jinja2 import filters, nodes, pass_environment, pass_eval_context
from jinja2.exceptions import SecurityError
from jinja2.utils import generate_lorem_ipsum

from sftprep.chat_template.reference.growth_limits import (
    LARGE_PERCENT,
    check_format,
    check_growth,
    check_indent,
    check_join,
    check_numbers,
    check_replace,
    check_sum,
    check_wordwrap,
)

_PADDING_FILTERS = ("center", "indent", "batch", "slice", "wordwrap")


def checked_filters(defaults: Mapping[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    """Return checked versions of the filters with potentially huge results.

    Args:
        defaults: The filters of a Jinja environment, by name.
    """
    padding = {name: with_checked_numbers(defaults[name]) for name in _PADDING_FILTERS}
    return {
        **padding,
        "format": _with_checked_widths(defaults["format"]),
        "replace": _replace,
        "join": _join,
        "sum": _sum,
        "indent": _with_check(padding["indent"], check_indent, 0),
        # Jinja passes the environment to `wordwrap` first, which the check does not take.
        "wordwrap": _with_check(padding["wordwrap"], check_wordwrap, 1),
    }


def with_checked_numbers(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a filter or function with a check against large numbers as arguments."""

    def checked(*args: Any, **kwargs: Any) -> Any:
        check_numbers((args, kwargs))
        return function(*args, **kwargs)

    return _with_pass_arg_of(function, checked)


def lipsum(n: int = 5, html: bool = True, min: int = 20, max: int = 100) -> str:
    """Return filler text like Jinja's `lipsum`, within the size limit."""
    # An estimate: a word of the filler text has about 8 characters, including the space.
    check_growth("lipsum", 8 * n * max, 0)
    return generate_lorem_ipsum(n, html, min, max)


def to_reiterable(value: Any) -> Any:
    """Return an iterable for repeated iteration."""
    if type(value) in (list, str, tuple):  # the usual types, without the slower test
        return value
    return value if isinstance(value, str | Sequence | Mapping) else list(value)


def _with_check(
    function: Callable[..., Any], check: Callable[..., None], num_passed: int
) -> Callable[..., Any]:
    """Return a filter with a check of its arguments.

    Args:
        num_passed: Number of arguments that Jinja passes before the value; the check does not get
            them.
    """

    def checked(*args: Any, **kwargs: Any) -> Any:
        check(*args[num_passed:], **kwargs)
        return function(*args, **kwargs)

    return _with_pass_arg_of(function, checked)


def _with_pass_arg_of(
    function: Callable[..., Any], checked: Callable[..., Any]
) -> Callable[..., Any]:
    # From this attribute Jinja knows whether the function takes the environment or the context as
    # its first argument.
    if hasattr(function, "jinja_pass_arg"):
        checked.jinja_pass_arg = function.jinja_pass_arg  # type: ignore[attr-defined]
    return checked


def _with_checked_widths(function: Callable[..., str]) -> Callable[..., str]:
    """Return the `format` filter with a check against large widths."""

    def checked(value: Any, *args: Any, **kwargs: Any) -> str:
        if LARGE_PERCENT.search(str(value)):
            raise SecurityError("the chat template formats to a huge width")
        check_format(str(value), str(value).count("%"), [*args, kwargs])
        return function(value, *args, **kwargs)

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
    # The attribute is looked up here, because the check needs the items that are joined.
    if attribute is not None:
        value = map(filters.make_attrgetter(context.environment, attribute), value)
    items = to_reiterable(value)
    if len(items) > 1:  # most lists of parts have one
        check_join(d, items)
    return filters.sync_do_join(context, items, d)


@pass_environment
def _sum(
    environment: jinja2.Environment,
    iterable: Any,
    attribute: str | int | None = None,
    start: Any = 0,
) -> Any:
    # Only a sum of lists can be huge.
    if isinstance(start, list | tuple):
        if attribute is not None:
            iterable = map(filters.make_attrgetter(environment, attribute), iterable)
        iterable, attribute = list(iterable), None
        check_sum(iterable, start)
    return filters.sync_do_sum(environment, iterable, attribute, start)
