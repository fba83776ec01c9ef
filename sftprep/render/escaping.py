"""Special tokens in the content of examples: counted, and marked as plain text."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from sftprep.core.types import Counts, Example
from sftprep.errors import TemplateError
from sftprep.recipe import Recipe
from sftprep.tokenize.encoders.special_tokens import MARKS, SpecialTokenScanner


class ContentEscaper:
    """A finder of special tokens in examples, used before the template adds its own.

    Args:
        recipe: The recipe, whose `escape_special` determines whether they become plain text.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe

    @cached_property
    def scanner(self) -> SpecialTokenScanner:
        """The special tokens of the tokenizer."""
        return SpecialTokenScanner(self._recipe.tokenizer)

    def escape(self, example: Example, counts: Counts) -> str | None:
        """Count the strings with special tokens in an example, and mark these tokens.

        Returns:
            The mark, which is now part of the strings of the example; None if nothing is marked,
            because nothing was found or `escape_special` is off.

        Raises:
            TemplateError: The example contains every character that could be the mark.
        """
        scanner = self.scanner
        num_found = self._count(example)
        if num_found:
            counts.warn("special_token_in_content", example.line, num_found)
        messages = example.messages or ()
        # Reasoning and tool calls are outside the content; most messages have neither.
        if not self._recipe.escape_special or not (
            num_found or any(len(m) > 2 and scanner.any_in(m) for m in messages)
        ):
            return None
        content = str((example.text, example.prompt, example.completion, example.messages))
        mark = next((mark for mark in MARKS if mark not in content), None)
        if mark is None:
            raise TemplateError(
                "a text contains every character that could mark its special tokens as plain text"
            )
        example.text = scanner.insert_marks(example.text, mark)
        example.prompt = scanner.insert_marks(example.prompt, mark)
        example.completion = scanner.insert_marks(example.completion, mark)
        if example.messages is not None:
            # Roles are compared with names, so they are left as they are.
            example.messages = [
                {**scanner.insert_marks(m, mark), "role": m["role"]} for m in example.messages
            ]
            if example.prompt_messages is not None:
                example.prompt_messages = example.messages[: len(example.prompt_messages)]
        return mark

    def _count(self, example: Example) -> int:
        """Return the number of strings with a special token.

        The final end token of a plain text is not counted.
        """
        strings: list[Any] = [
            text.removesuffix(self._recipe.tokenizer.eos_token or "")
            for text in (example.text,)
            if text
        ]
        strings += [text for text in (example.prompt, example.completion) if text]
        strings += [
            m["content"] for m in example.messages or () if isinstance(m.get("content"), str)
        ]
        return sum(map(self.scanner.is_in, strings))
