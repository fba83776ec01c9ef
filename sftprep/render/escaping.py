"""Special tokens in the content of examples: counted, and marked as plain text."""

from __future__ import annotations

from functools import cached_property

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
        """Count an example with special tokens in its strings, and mark these tokens.

        Returns:
            The mark, which is now part of the strings of the example; None if nothing is marked,
            because nothing was found or `escape_special` is off.

        Raises:
            TemplateError: The example contains every character that could be the mark.
        """
        scanner = self.scanner
        if not self._holds_special_token(example):
            return None
        counts.warn_once("special_token_in_content", example.line)
        if not self._recipe.escape_special:
            return None
        content = str(
            (example.text, example.prompt, example.completion, example.messages, example.tools)
        )
        mark = next((mark for mark in MARKS if mark not in content), None)
        if mark is None:
            raise TemplateError(
                "a text contains every character that could mark its special tokens as plain text"
            )
        example.text = scanner.insert_marks(example.text, mark)
        if example.prompt is not None or example.completion is not None:
            self._mark_completion(example, mark)
        if example.messages is not None:
            # Roles are compared with names, so they are left as they are.
            example.messages = [
                {**scanner.insert_marks(m, mark), "role": m["role"]} for m in example.messages
            ]
            example.tools = scanner.insert_marks(example.tools, mark)
            if example.prompt_messages is not None:
                example.prompt_messages = example.messages[: len(example.prompt_messages)]
        return mark

    def _mark_completion(self, example: Example, mark: str) -> None:
        """Mark the special tokens of a prompt and its completion, which are joined."""
        prompt = example.prompt or ""
        joined = self.scanner.insert_marks(prompt + (example.completion or ""), mark)
        end = len(prompt)
        while end - joined.count(mark, 0, end) < len(prompt):
            end += 1
        example.prompt, example.completion = joined[:end], joined[end:]

    def _holds_special_token(self, example: Example) -> bool:
        """Return whether a string of an example contains a special token.

        The final end token of a plain text does not count.
        """
        scanner = self.scanner
        if example.text:
            return scanner.is_in(example.text.removesuffix(self._recipe.tokenizer.eos_token or ""))
        for message in example.messages or ():
            content = message.get("content")
            # Most messages have neither reasoning nor calls.
            if len(message) == 2 and isinstance(content, str):
                is_found = scanner.is_in(content)
            else:
                is_found = scanner.any_in(message)
            if is_found:
                return True
        joined = (example.prompt or "") + (example.completion or "")
        return scanner.is_in(joined) or scanner.any_in(example.tools)
