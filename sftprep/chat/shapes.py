"""What a chat template makes of all conversations of one shape, the same roles in the same order:
literal text around contents.

The compiled template (pieces.py) is run once with stand-ins for the contents. A stand-in knows
nothing of its content, so it answers only what can be answered for every content that meets a
condition ("does not hold `</think>`", "is not empty"), and notes the condition; blanks that are
stripped off become a step to take later. Anything else that a template does with a content (its
length, its letters, what it is in JSON) ends the attempt, and such conversations are rendered one
by one.

Stand-ins are no texts: a function that looks into a text without asking fails on them, and never
sees a made-up content.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, NoReturn

from sftprep.chat import runtime

Change = tuple[str, tuple[str, ...]]
"""A method of texts that strips, and its arguments."""
Outline = Callable[
    [list[dict[str, Any]], Any, bool, Mapping[str, Any]], tuple[list[Any], list[int]]
]
"""(messages, tools, add_generation_prompt, the other variables) -> (texts and stand-ins in order,
marks: as in pieces.py)."""


@dataclass(slots=True)
class Conditions:
    """What contents must meet for shapes to hold: none of `absent` is in one, and none is empty
    after `filled` changes."""

    absent: set[str] = field(default_factory=set)
    filled: set[tuple[Change, ...]] = field(default_factory=set)

    def broken(self, contents: Sequence[str], *, may_hold: bool = True) -> list[int]:
        """Numbers of the contents that do not meet them, in order. may_hold: it is not known that
        no `absent` is in any."""
        found: set[int] = set()
        if self.absent and may_hold:
            found.update(
                n
                for n, content in enumerate(contents)
                if any(text in content for text in self.absent)
            )
        for changes in self.filled:
            left = list(contents) if changes else contents
            for method, arguments in changes:
                left = [getattr(content, method)(*arguments) for content in left]
            if not all(left):
                found.update(number for number, content in enumerate(left) if not content)
        return sorted(found)


@dataclass(frozen=True, slots=True, eq=False)
class Shape:
    """Literal text, content, literal text, ... content, literal text.

    roles: of the messages; content_first: in each, the content stands before the role; literals:
    one more than there are contents; order: numbers of the messages whose contents they are, None
    where that is all of them in order; changes: of single contents, by their places among literals
    and contents; marks: for each span that the template marks, the contents before its start and
    the literal characters, and both before its end.
    """

    roles: tuple[str, ...]
    content_first: bool
    literals: tuple[str, ...]
    order: tuple[int, ...] | None
    changes: tuple[tuple[int, Change], ...]
    marks: tuple[tuple[int, int, int, int], ...]

    def messages(self, contents: Sequence[str]) -> list[dict[str, str]]:
        """The conversation with these contents."""
        return _messages(self.roles, contents, self.content_first)

    def fill(self, contents: Sequence[str]) -> tuple[str, tuple[tuple[int, int], ...]]:
        """The text, and the character ranges of its marked spans."""
        parts = [""] * (2 * len(self.literals) - 1)
        parts[::2] = self.literals
        parts[1::2] = (
            contents if self.order is None else [contents[number] for number in self.order]
        )
        for place, (method, arguments) in self.changes:
            parts[place] = getattr(parts[place], method)(*arguments)
        if not self.marks:
            return "".join(parts), ()
        before = [0, *accumulate(map(len, parts[1::2]))]
        return "".join(parts), tuple((before[a] + b, before[c] + d) for a, b, c, d in self.marks)


class Shaper:
    """Makes the shapes of one template. conditions: what contents must meet for those that were
    made so far."""

    def __init__(self, outline: Outline) -> None:
        self._outline = outline
        self.conditions = Conditions()
        self._noted = Conditions()
        self._contents: list[_Content] = []

    def shape(
        self, roles: Sequence[str], variables: Mapping[str, Any], *, content_first: bool
    ) -> Shape | None:
        """The shape of conversations of these roles, whose messages have a content beside the role
        and nothing else.

        content_first: in this order, for a template that goes over the keys of a message tells
        which came first. None where there is no shape.
        """
        self._noted.absent.clear()
        self._noted.filled.clear()
        self._contents += [
            _Content((_Hole(number, ()),), self._noted)
            for number in range(len(self._contents), len(roles))
        ]
        try:
            messages = _messages(roles, self._contents[: len(roles)], content_first)
            shape = _shape(
                *self._outline(messages, None, False, variables), tuple(roles), content_first
            )
        except (
            Exception,
            _Unanswerable,
        ):  # whatever it is, the general way finds it again and says it in its own words
            return None
        self.conditions.absent |= self._noted.absent
        self.conditions.filled |= self._noted.filled
        return shape


def _messages(
    roles: Sequence[str], contents: Sequence[Any], content_first: bool
) -> list[dict[str, Any]]:
    pairs = zip(roles, contents, strict=True)
    if content_first:
        return [{"content": content, "role": role} for role, content in pairs]
    return [{"role": role, "content": content} for role, content in pairs]


def symbolic(names: Mapping[str, object]) -> dict[str, object]:
    """The names that a compiled template uses, bound to what takes stand-ins as well as texts."""
    return {
        **names,
        "text": lambda value: value if type(value) is _Content else str(value),
        "join": _joined,
        "trim": lambda value: value.strip() if type(value) is _Content else runtime.trim(value),
        "exact": lambda value: value if type(value) is _Content else runtime.exact(value),
        "attr": lambda value, name: (
            runtime.UNDEFINED if type(value) is _Content else runtime.attr(value, name)
        ),
        "is_filled": lambda value: (
            bool(value) if type(value) is _Content else runtime.is_filled(value)
        ),
        "size": lambda _out: 0,  # `fill` is followed by a look at the length
        "finish": lambda out, marks, turns: _refuse() if turns else (out, marks),
        "filter_join": _join_filter(names.get("filter_join")),
        # Whether two equal texts are one object differs from conversation to conversation.
        "test_sameas": _refuse,
        # A text before `%` takes what has items for a mapping.
        "test_divisibleby": lambda value, by, /: (
            _refuse() if type(by) is _Content else value % by == 0
        ),
    }


class _Unanswerable(BaseException):
    """A question about a content that has no one answer. No `Exception`, for Jinja's filters catch
    those and answer anyhow."""


class _Hole(NamedTuple):
    """The content of a message after some changes."""

    message: int
    changes: tuple[Change, ...]

    def changed(self, method: str, arguments: tuple[str, ...]) -> _Hole:
        return _Hole(self.message, (*self.changes, (method, arguments)))


class _Content:  # noqa: PLW1641 - its hash refuses, below
    """Stands for a text that consists of literal texts, none of them empty or beside another, and
    of contents nobody knows."""

    __slots__ = ("_noted", "parts")

    def __init__(self, parts: tuple[str | _Hole, ...], noted: Conditions) -> None:
        self.parts, self._noted = parts, noted

    # To templates it is a text.
    __class__ = property(lambda _: str)

    def strip(self, *arguments: Any) -> _Content:
        return self._stripped("strip", arguments)

    def lstrip(self, *arguments: Any) -> _Content:
        return self._stripped("lstrip", arguments)

    def rstrip(self, *arguments: Any) -> _Content:
        return self._stripped("rstrip", arguments)

    def __contains__(self, text: Any) -> bool:
        if len(self.parts) == 1 and type(text) is str and text in self._noted.absent:
            return False  # it is only a content, of which this was asked before
        if type(text) is str and any(text in part for part in self.parts if type(part) is str):
            return True
        return self._lacks(text)

    def startswith(self, texts: Any, /) -> bool:
        return self._hole_lacks(*texts) if type(texts) is tuple else self._hole_lacks(texts)

    endswith = startswith

    # Arguments by place only: real texts have other names for them, or none.
    def split(self, separator: Any = None, most: Any = -1, /) -> list[Any]:
        _check_number(most)
        self._lacks(separator)
        if len(self.parts) == 1:
            return [self]
        if most != -1:
            _refuse()
        found: list[tuple[str | _Hole, ...]] = [()]
        for part in self.parts:
            first, *others = part.split(separator) if type(part) is str else (part,)
            found[-1] += (first,) if first else ()
            found += [(other,) if other else () for other in others]
        return [
            _Content(parts, self._noted) if any(map(_is_hole, parts)) else "".join(map(str, parts))
            for parts in found
        ]

    def rsplit(self, separator: Any = None, most: Any = -1, /) -> list[Any]:
        self._hole()
        return self.split(separator, most)

    def partition(self, separator: Any, /) -> tuple[Any, str, str]:
        self._hole_lacks(separator)
        return self, "", ""

    def rpartition(self, separator: Any, /) -> tuple[str, str, Any]:
        self._hole_lacks(separator)
        return "", "", self

    def replace(self, old: Any, new: Any, most: Any = -1, /) -> _Content:
        _check_number(most)
        if type(new) is not str:
            _refuse()
        self._hole_lacks(old)
        return self

    def removeprefix(self, text: Any, /) -> _Content:
        self._hole_lacks(text)
        return self

    removesuffix = removeprefix

    def __eq__(self, other: object) -> bool:
        if type(other) is _Content and other.parts == self.parts:
            return True
        if type(other) is not str:
            if isinstance(other, str):  # a stand-in for something else, or Markup
                _refuse()
            return False
        return self._hole_lacks(other) if other else not self

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __bool__(self) -> bool:
        if any(type(part) is str for part in self.parts):
            return True
        self._noted.filled.add(self._hole().changes)
        return True

    def __add__(self, other: Any) -> _Content:
        return _summed(self, other, self._noted)

    def __radd__(self, other: Any) -> _Content:
        return _summed(other, self, self._noted)

    def __getattr__(self, name: str) -> NoReturn:
        _refuse()

    def _hole(self) -> _Hole:
        only = self.parts[0]
        if len(self.parts) == 1 and isinstance(only, _Hole):
            return only
        _refuse()

    def _stripped(self, method: str, arguments: tuple[Any, ...]) -> _Content:
        if len(arguments) > 1 or not all(type(argument) is str for argument in arguments):
            _refuse()
        parts = list(self.parts)
        if len(parts) == 1:
            return _Content((self._hole().changed(method, arguments),), self._noted)
        # Each end, up to a literal in which the stripping stops.
        for one, end, following in (("lstrip", 0, 1), ("rstrip", -1, -2)):
            if method not in ("strip", one):
                continue
            part, beside = parts[end], parts[following]
            if isinstance(part, _Hole):
                if type(beside) is not str or getattr(beside, one)(*arguments) != beside:
                    _refuse()
                parts[end] = part.changed(one, arguments)
            else:
                parts[end] = getattr(part, one)(*arguments) or _refuse()
        return _Content(tuple(parts), self._noted)

    def _lacks(self, *texts: Any) -> bool:
        """False: none of them is in a content, nor was it before that was stripped; that is a
        condition from now on.

        Nor is any in a content and a literal beside it.
        """
        if not all(type(text) is str and text for text in texts):
            _refuse()
        for before, after in pairwise(self.parts):
            if _is_hole(before) and _is_hole(after):
                _refuse()
            for text in texts:
                for first, rest in ((text[:cut], text[cut:]) for cut in range(1, len(text))):
                    if type(before) is str and before.endswith(first):
                        _refuse()
                    if type(after) is str and (after.startswith(rest) or rest.startswith(after)):
                        _refuse()
        self._noted.absent.update(texts)
        return False

    def _hole_lacks(self, *texts: Any) -> bool:
        """The same of what is a content only."""
        self._hole()
        return self._lacks(*texts)


def _refuse(*_: Any, **__: Any) -> NoReturn:
    raise _Unanswerable


# What Python asks of a text by itself, and would answer or refuse in some other way if it were left
# out here.
for _name in (
    *(
        "str",
        "repr",
        "format",
        "hash",
        "bytes",
        "len",
        "iter",
        "reversed",
        "getitem",
        "lt",
        "le",
        "gt",
        "ge",
    ),
    *(
        "mul",
        "rmul",
        "mod",
        "rmod",
        "sub",
        "rsub",
        "truediv",
        "floordiv",
        "pow",
        "neg",
        "abs",
        "round",
    ),
    *("int", "float", "complex", "index"),
):
    setattr(_Content, f"__{_name}__", _refuse)


def _check_number(value: Any) -> None:
    if type(value) is not int or abs(value) > 1 << 30:
        _refuse()


def _is_hole(part: object) -> bool:
    return type(part) is _Hole


def _summed(left: Any, right: Any, noted: Conditions) -> _Content:
    parts: list[str | _Hole] = []
    for value in (left, right):
        if type(value) is not _Content and type(value) is not str:
            _refuse()
        own: Any = value.parts if type(value) is _Content else (value,)
        for part in own:
            last = parts[-1] if parts else None
            if type(part) is str and type(last) is str:
                parts[-1] = last + part
            elif part:
                parts.append(part)
    return _Content(tuple(parts), noted)


def _joined(parts: Iterable[Any]) -> Any:
    """The parts of a text as one text, or as a stand-in where one of them is."""
    parts = list(parts)
    known = [part for part in parts if type(part) is _Content]
    if not known:
        return "".join(parts)
    joined: Any = ""
    for part in parts:
        joined = (
            joined + part
            if type(joined) is _Content or type(part) is str
            else _summed(joined, part, known[0]._noted)
        )
    return joined


def _join_filter(usual: Any) -> Callable[..., Any]:
    """The filter `join`, for lists with stand-ins too."""

    def join(context: Any, value: Any, *arguments: Any, **named: Any) -> Any:
        if named or type(value) is not list or not any(type(one) is _Content for one in value):
            return usual(context, value, *arguments, **named)
        if len(arguments) > 1 or not all(type(argument) is str for argument in arguments):
            _refuse()
        between = arguments[0] if arguments else ""
        parts = [
            part for one in value for part in (between, one if type(one) is _Content else str(one))
        ]
        return _joined(parts[1:])

    return join


def _shape(
    written: Sequence[Any], marks: Sequence[int], roles: tuple[str, ...], content_first: bool
) -> Shape:
    literals: list[str] = []
    literal: list[str] = []
    holes: list[int] = []
    changes: list[tuple[int, Change]] = []
    places: list[tuple[int, int]] = []
    for part in [*written, ""]:
        if marks:
            places.append((len(holes), sum(map(len, literals)) + sum(map(len, literal))))
        if type(part) is str:
            literal.append(part)
            continue
        for piece in part.parts if type(part) is _Content else (part,):
            if type(piece) is str:
                literal.append(piece)
            elif type(piece) is _Hole:
                if piece.changes:
                    changes += [(2 * len(holes) + 1, change) for change in piece.changes]
                holes.append(piece.message)
                literals.append("".join(literal))
                literal.clear()
            else:
                _refuse()  # not text, or Markup, which escapes what it is added to
    literals.append("".join(literal))
    spans = tuple(
        (*places[first], *places[last]) for first, last in zip(marks[::2], marks[1::2], strict=True)
    )
    order = None if holes == list(range(len(roles))) else tuple(holes)
    return Shape(roles, content_first, tuple(literals), order, tuple(changes), spans)
