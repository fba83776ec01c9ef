"""A conversation with a model, whose answers are written while they are generated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jinja2 import TemplateError as JinjaError
from transformers import TextStreamer

from sftprep.errors import ConfigError, TemplateError, first_line, setting
from sfttrain.chat.trained_model import TrainedModel
from sfttrain.models.unwrap import unwrap_peft


@dataclass(frozen=True)
class Answer:
    """The answer to one message."""

    answer: str
    """Its text, without special tokens."""
    prompt_tokens: int
    """The tokens of the conversation before the answer, as the template renders it."""
    answer_tokens: int | None
    """The generated tokens, with the end token; None after an interruption."""
    end: str
    """"end" (the model ended it), "length" (`max_new_tokens`, or the model's context), or
    "interrupted"."""


class ChatSession:
    """A conversation of several turns.

    Args:
        trained: The model.
        system: The system message of the conversation; None for none.
        max_new_tokens: The maximum tokens of an answer.
        temperature: 0 for the most probable tokens; None for the model's own generation settings.

    Example:
        session = ChatSession(load_trained_model("out", device=torch.device("cpu")))
        session.ask("How do I boil an egg?", lambda text: print(text, end="", flush=True))
    """

    def __init__(
        self,
        trained: TrainedModel,
        *,
        system: str | None = None,
        max_new_tokens: int = 512,
        temperature: float | None = None,
    ) -> None:
        self._model, self._tokenizer = trained.model, trained.tokenizer
        self._first = [] if system is None else [{"role": "system", "content": system}]
        self._turns: list[dict[str, str]] = []
        self._max_new_tokens = max_new_tokens
        # Settings of generate() that have other values than the model's own.
        self._sampling: dict[str, Any] = {}
        if temperature == 0:
            self._sampling = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        elif temperature is not None:
            self._sampling = {"do_sample": True, "temperature": temperature}
        self._end_ids = self._find_end_ids()

    def reset(self) -> None:
        """Forget all turns except for the system message."""
        self._turns.clear()

    def ask(self, message: str, write: Callable[[str], None]) -> Answer:
        """Answer a message of the user.

        KeyboardInterrupt ends the answer. What was generated until then stays in the conversation.

        Args:
            message: The message.
            write: Called with each new piece of the answer.

        Raises:
            ConfigError: The conversation is longer than the context of the model.
            TemplateError: The template rejects the conversation.
        """
        turns = [*self._turns, {"role": "user", "content": message}]
        inputs = self._render([*self._first, *turns])
        prompt_tokens = int(inputs["input_ids"].shape[1])
        limit = self._tokens_left(prompt_tokens)
        stream = _AnswerStream(self._tokenizer, write)
        try:
            with torch.no_grad():
                output = self._model.generate(
                    **inputs,
                    **self._sampling,
                    max_new_tokens=limit,
                    eos_token_id=self._end_ids or None,
                    pad_token_id=self._pad_id(),
                    streamer=stream,
                )
        except KeyboardInterrupt:
            stream.end()
            answer = Answer(stream.text, prompt_tokens, None, "interrupted")
        else:
            generated = output[0, prompt_tokens:].tolist()
            end = "end" if generated and generated[-1] in self._end_ids else "length"
            answer = Answer(stream.text, prompt_tokens, len(generated), end)
        self._turns = [*turns, {"role": "assistant", "content": answer.answer}]
        return answer

    def _render(self, messages: list[dict[str, str]]) -> dict[str, torch.Tensor]:
        """Return the ids of a conversation and their attention mask, int64 [1, n] each."""
        try:
            encoded = self._tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
            )
        except JinjaError as error:
            raise TemplateError(
                f"the chat template rejects the conversation: {first_line(error, 300)}",
                remedy=[
                    f"leave {setting('system')} out, if the template has no system message",
                    f"use another template: {setting('chat_template', 'FILE.jinja')}",
                ],
            ) from error
        # Some tokenizers return token_type_ids, which a causal model does not take.
        return {
            name: encoded[name].to(self._model.device) for name in ("input_ids", "attention_mask")
        }

    def _tokens_left(self, prompt_tokens: int) -> int:
        config = unwrap_peft(self._model).config.get_text_config()
        context = getattr(config, "max_position_embeddings", None)
        if not isinstance(context, int) or context <= 0:
            return self._max_new_tokens
        if prompt_tokens >= context:
            raise ConfigError(
                f"the conversation has {prompt_tokens:,} tokens, but the model's positions end at"
                f" {context:,}",
                remedy="start a new one with /reset, or shorten the message",
            )
        return min(self._max_new_tokens, context - prompt_tokens)

    def _find_end_ids(self) -> list[int]:
        """Return the ids that end an answer: those of the model, and that of the training."""
        own = self._model.generation_config.eos_token_id
        found = [] if own is None else own if isinstance(own, list) else [own]
        saved = self._tokenizer.eos_token_id
        return sorted({*found, *([] if saved is None else [saved])})

    def _pad_id(self) -> int | None:
        pad: int | None = self._tokenizer.pad_token_id
        return pad if pad is not None else next(iter(self._end_ids), None)


class _AnswerStream(TextStreamer):  # type: ignore[misc]
    """A streamer that passes on the pieces of an answer, and keeps them."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._write = write
        self.text = ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Pass on the text; called by `generate` for each complete word."""
        if text:
            self.text += text
            self._write(text)
