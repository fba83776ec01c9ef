"""What a chat template makes of all conversations of one shape, the same roles in the same order: literal text around contents.

The compiled template (pieces.py) is run once with stand-ins for the contents. A stand-in knows nothing of its content, so it
answers only what can be answered for every content that meets a condition ("does not hold `</think>`", "is not empty"), and
notes the condition; blanks that are stripped off become a step to take later. Anything else that a template does with a content
(its length, its letters, what it is in JSON) ends the attempt, and such conversations are rendered one by one.

Stand-ins are no texts: a function that looks into a text without asking fails on them, and never sees a made-up content.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from itertools import accumulate, chain
from typing import Any, NamedTuple, NoReturn

from sftprep.chat import runtime
from sftprep.lookup import holds_any

Change = tuple[str, tuple[str, ...]]
"""A method of texts that strips, and its arguments."""
Outline = Callable[[list[dict[str, Any]], Any, bool, Mapping[str, Any]], tuple[list[Any], list[int]]]
"""(messages, tools, add_generation_prompt, the other variables) -> (texts and stand-ins in order, marks: as in pieces.py)."""


@dataclass(slots=True)
class Conditions:
    """What contents must meet for shapes to hold: none of `absent` is in one, and none is empty after `filled` changes."""

    absent: set[str] = field(default_factory=set)
    filled: set[tuple[Change, ...]] = field(default_factory=set)

    def broken(self, contents: Sequence[str]) -> list[int]:
        """Numbers of the contents that do not meet them, in order."""
        found: set[int] = set()
        joined = "\0".join(contents).encode("utf-8", "surrogatepass") if self.absent else b""
        if self.absent and holds_any(joined, [text.encode("utf-8", "surrogatepass") for text in self.absent]):
            found.update(n for n, content in enumerate(contents) if any(text in content for text in self.absent))
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

    roles: of the messages; literals: one more than there are contents; order: numbers of the messages whose contents they are,
    None where that is all of them in order; changes: of single contents, by their places among literals and contents; marks: for
    each span that the template marks, the contents before its start and the literal characters, and both before its end.
    """

    roles: tuple[str, ...]
    literals: tuple[str, ...]
    order: tuple[int, ...] | None
    changes: tuple[tuple[int, Change], ...]
    marks: tuple[tuple[int, int, int, int], ...]

    def fill(self, contents: Sequence[str]) -> tuple[str, tuple[tuple[int, int], ...]]:
        """The text, and the character ranges of its marked spans."""
        parts = [""] * (2 * len(self.literals) - 1)
        parts[::2] = self.literals
        parts[1::2] = contents if self.order is None else [contents[number] for number in self.order]
        for place, (method, arguments) in self.changes:
            parts[place] = getattr(parts[place], method)(*arguments)
        if not self.marks:
            return "".join(parts), ()
        before = [0, *accumulate(map(len, parts[1::2]))]
        return "".join(parts), tuple((before[a] + b, before[c] + d) for a, b, c, d in self.marks)


def shape_of(outline: Outline, roles: Sequence[str], variables: Mapping[str, Any], conditions: Conditions) -> Shape | None:
    """The shape of conversations of these roles, whose messages have a content beside the role and nothing else.

    None where there is none; what contents must meet is added to `conditions`.
    """
    noted = Conditions()
    contents = [_Content((_Hole(number, ()),), noted) for number in range(len(roles))]
    pairs = [*zip(roles, contents, strict=True)]
    try:
        shape = _shape(*outline([{"role": role, "content": own} for role, own in pairs], None, False, variables), tuple(roles))
        # A template that goes over the keys of a message tells which came first, and a shape does not.
        turned = _shape(*outline([{"content": own, "role": role} for role, own in pairs], None, False, variables), tuple(roles))
        if astuple(shape) != astuple(turned):
            return None
    except (Exception, _Unanswerable):  # whatever it is, the general way finds it again and says it in its own words
        return None
    conditions.absent |= noted.absent
    conditions.filled |= noted.filled
    return shape


def symbolic(names: Mapping[str, object]) -> dict[str, object]:
    """The names that a compiled template uses, bound to what takes stand-ins as well as texts."""
    return {
        **names,
        "text": lambda value: value if type(value) is _Content else str(value),
        "join": _joined,
        "trim": lambda value: value.strip() if type(value) is _Content else runtime.trim(value),
        "exact": lambda value: value if type(value) is _Content else runtime.exact(value),
        "attr": lambda value, name: runtime.UNDEFINED if type(value) is _Content else runtime.attr(value, name),
        "finish": lambda out, marks, _turns: (out, marks),
    }


class _Unanswerable(BaseException):
    """A question about a content that has no one answer. No `Exception`, for Jinja's filters catch those and answer anyhow."""


class _Hole(NamedTuple):
    """The content of a message after some changes."""

    message: int
    changes: tuple[Change, ...]


class _Content:  # noqa: PLW1641 - its hash refuses, below
    """Stands for a text that consists of literal texts and of contents that nobody knows yet."""

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
        if type(text) is str and any(text in part for part in self.parts if type(part) is str):
            return True
        return self._lacks(text)

    def startswith(self, texts: Any, /) -> bool:
        return self._lacks(*texts) if type(texts) is tuple else self._lacks(texts)

    endswith = startswith

    # Arguments by place only: real texts have other names for them, or none.
    def split(self, separator: Any = None, most: Any = -1, /) -> list[_Content]:
        _check_number(most)
        self._lacks(separator)
        return [self]

    rsplit = split

    def partition(self, separator: Any, /) -> tuple[Any, str, str]:
        self._lacks(separator)
        return self, "", ""

    def rpartition(self, separator: Any, /) -> tuple[str, str, Any]:
        self._lacks(separator)
        return "", "", self

    def replace(self, old: Any, new: Any, most: Any = -1, /) -> _Content:
        _check_number(most)
        if type(new) is not str:
            _refuse()
        self._lacks(old)
        return self

    def removeprefix(self, text: Any, /) -> _Content:
        self._lacks(text)
        return self

    removesuffix = removeprefix

    def __eq__(self, other: object) -> bool:
        if type(other) is _Content and other.parts == self.parts:
            return True
        if type(other) is not str:
            if isinstance(other, str):  # a stand-in for something else, or Markup
                _refuse()
            return False
        return self._lacks(other) if other else not self

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
        hole = self._hole()
        if len(arguments) > 1 or not all(type(argument) is str for argument in arguments):
            _refuse()
        return _Content((_Hole(hole.message, (*hole.changes, (method, arguments))),), self._noted)

    def _lacks(self, *texts: Any) -> bool:
        """False: none of them is in the content, nor was it before it was stripped; that is a condition from now on."""
        self._hole()
        if not all(type(text) is str and text for text in texts):
            _refuse()
        self._noted.absent.update(texts)
        return False


def _refuse(*_: Any, **__: Any) -> NoReturn:
    raise _Unanswerable


# What Python asks of a text by itself, and would answer or refuse in some other way if it were left out here.
for _name in (
    *("str", "repr", "format", "hash", "bytes", "len", "iter", "reversed", "getitem", "lt", "le", "gt", "ge"),
    *("mul", "rmul", "mod", "rmod", "sub", "rsub", "truediv", "floordiv", "pow", "neg", "abs", "round"),
    *("int", "float", "complex", "index"),
):
    setattr(_Content, f"__{_name}__", _refuse)


def _check_number(value: Any) -> None:
    if type(value) is not int or abs(value) > 1 << 30:
        _refuse()


def _summed(left: Any, right: Any, noted: Conditions) -> _Content:
    parts: list[str | _Hole] = []
    for value in (left, right):
        if type(value) is _Content:
            parts += value.parts
        elif type(value) is str:
            parts += [value] if value else []
        else:
            _refuse()
    return _Content(tuple(parts), noted)


def _joined(parts: Iterable[Any]) -> Any:
    """The parts of a text as one text, or as a stand-in where one of them is."""
    parts = list(parts)
    known = [part for part in parts if type(part) is _Content]
    if not known:
        return "".join(parts)
    joined: Any = ""
    for part in parts:
        joined = joined + part if type(joined) is _Content or type(part) is str else _summed(joined, part, known[0]._noted)
    return joined


def _shape(written: Sequence[Any], marks: Sequence[int], roles: tuple[str, ...]) -> Shape:
    parts: list[list[str]] = [[]]
    holes: list[int] = []
    changes: list[tuple[int, Change]] = []
    places: list[tuple[int, int]] = []
    for part in written:
        if marks:
            places.append((len(holes), sum(map(len, chain.from_iterable(parts)))))
        for piece in part.parts if type(part) is _Content else (part,):
            if type(piece) is str:
                parts[-1].append(piece)
            elif type(piece) is _Hole:
                changes += [(2 * len(holes) + 1, change) for change in piece.changes]
                holes.append(piece.message)
                parts.append([])
            else:
                _refuse()  # not text, or Markup, which escapes what it is added to
    places.append((len(holes), sum(map(len, chain.from_iterable(parts)))))
    spans = tuple((*places[first], *places[last]) for first, last in zip(marks[::2], marks[1::2], strict=True))
    order = None if holes == list(range(len(roles))) else tuple(holes)
    return Shape(roles, tuple(map("".join, parts)), order, tuple(changes), spans)
