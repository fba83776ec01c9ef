"""The command `sfttrain chat`: a conversation on a terminal, through a pipe, or a single answer."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TextIO

import torch
from transformers import set_seed

from sftprep.errors import (
    ConfigError,
    FlagNames,
    SftprepError,
    escape_control,
    setting,
)
from sfttrain.chat.session import Answer, ChatSession
from sfttrain.chat.trained_model import load_trained_model
from sfttrain.cli.arguments import SettingsParser

# Control characters could move the cursor or change the terminal's title. Unlike escape_control,
# this keeps the joiners of emoji and of Persian, which models write.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@dataclass
class ChatConfig:
    """The settings of `sfttrain chat`."""

    model: str | None = field(
        default=None,
        metadata={"help": "Base model of an adapter; by default the one that it was trained on."},
    )
    model_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of the base model on the Hub."}
    )
    system: str | None = field(
        default=None, metadata={"help": "System message of the conversation."}
    )
    prompt: str | None = field(
        default=None, metadata={"help": "Answer this message, and end; - reads it from stdin."}
    )
    max_new_tokens: int = field(default=512, metadata={"help": "Maximum tokens of an answer."})
    temperature: float | None = field(
        default=None,
        metadata={
            "help": (
                "0: the most probable tokens; higher: more varied; by default the model's own"
                " generation settings."
            )
        },
    )
    seed: int = field(default=42, metadata={"help": "Seed of the sampling."})
    chat_template: str | None = field(
        default=None, metadata={"help": "Jinja file to use instead of the saved template."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run the code that comes with the model."}
    )
    use_cpu: bool = field(default=False, metadata={"help": "Do not use a GPU."})
    json: bool = field(default=False, metadata={"help": "Print each answer as a line of JSON."})

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(
                f"{setting('max_new_tokens')} is {self.max_new_tokens}",
                remedy="specify at least 1",
            )
        if self.temperature is not None and not 0 <= self.temperature < math.inf:
            raise ConfigError(
                f"{setting('temperature')} is {self.temperature}",
                remedy="specify 0 for the most probable tokens, or a number such as 0.7",
            )


def chat(arguments: Sequence[str]) -> int:
    """Run the command.

    Returns:
        The exit code: 0 done, 1 a single answer was interrupted.

    Raises:
        SftprepError: The model cannot be loaded, or a message cannot be answered.
    """
    folder, config = _read_arguments(arguments)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    trained = load_trained_model(
        folder,
        device=torch.device("cpu") if device is None or config.use_cpu else device,
        base=config.model,
        base_revision=config.model_revision,
        chat_template=config.chat_template,
        trust_remote_code=config.trust_remote_code,
    )
    set_seed(config.seed)
    session = ChatSession(
        trained,
        system=config.system,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
    )
    if config.prompt is not None:
        message = sys.stdin.read() if config.prompt == "-" else config.prompt
        return _exit_code(_answer(session, message, config))
    if sys.stdin.isatty() and sys.stdout.isatty():
        _converse(session, config, f"{trained.description}, on {trained.model.device}")
        return 0
    return _answer_lines(session, config, sys.stdin)


def _read_arguments(arguments: Sequence[str]) -> tuple[str, ChatConfig]:
    parser = SettingsParser([ChatConfig], "sfttrain chat", "sfttrain chat DIR [options]")
    namespace, rest = parser.parse_known_args(list(arguments))
    parser.reject_unknown(rest)
    if len(rest) != 1:
        raise ConfigError(
            "DIR is missing" if not rest else f"only one DIR is possible: {', '.join(rest)}",
            remedy="specify the folder of a trained model: sfttrain chat DIR",
        )
    values = vars(namespace)
    names = [known.name for known in dataclasses.fields(ChatConfig)]
    return rest[0], ChatConfig(**{name: values[name] for name in names})


def _converse(session: ChatSession, config: ChatConfig, description: str) -> None:
    """Answer the messages that are typed on a terminal, until /exit or the end of the input."""
    import readline  # noqa: F401 (it makes input() edit the line and keep a history)

    print(f"{description}\n/reset: new conversation, /exit: end, Ctrl-C: end an answer")
    while True:
        try:
            message = input("\n> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n/exit or Ctrl-D ends the program", end="")
            continue
        if message == "/exit":
            return
        if message == "/reset":
            session.reset()
            print("new conversation")
        elif message:
            try:
                _answer(session, message, config)
            except KeyboardInterrupt:  # before the first token
                continue
            except SftprepError as error:  # the conversation goes on with another message
                shown = error.shown_by(FlagNames("_"))
                print(escape_control(f"error: {shown.message}\n  → {shown.remedy}"))


def _answer_lines(session: ChatSession, config: ChatConfig, source: TextIO) -> int:
    """Answer each line of a pipe or file, in one conversation."""
    for message in _messages(source):
        if message == "/reset":
            session.reset()
        elif _exit_code(_answer(session, message, config)):
            return 1  # nobody can type /exit here, so Ctrl-C ends the program
    return 0


def _messages(source: TextIO) -> Iterator[str]:
    for line in source:
        message = line.strip()
        if message == "/exit":
            return
        if message:
            yield message


def _answer(session: ChatSession, message: str, config: ChatConfig) -> Answer:
    """Write the answer to a message while it is generated, or as a line of JSON at its end."""
    if config.json:
        answer = session.ask(message, lambda _: None)
        values = {"prompt": message, **dataclasses.asdict(answer)}
        print(json.dumps(values, ensure_ascii=False), flush=True)
        return answer
    answer = session.ask(message, _write_visibly if sys.stdout.isatty() else _write)
    print(flush=True)
    note = _describe_end(answer, config.max_new_tokens)
    if note:  # on stderr, because stdout has the answers only
        print(f"[{note}]", file=sys.stderr)
    return answer


def _describe_end(answer: Answer, max_new_tokens: int) -> str:
    if answer.end == "interrupted":
        return "interrupted"
    if answer.end == "length":
        if answer.answer_tokens == max_new_tokens:
            return f"cut at --max_new_tokens {max_new_tokens}"
        return "cut at the context of the model"
    return "" if answer.answer else "the model ended its turn at once"


def _write(text: str) -> None:
    print(text, end="", flush=True)


def _write_visibly(text: str) -> None:
    _write(_CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text))


def _exit_code(answer: Answer) -> int:
    return 1 if answer.end == "interrupted" else 0
