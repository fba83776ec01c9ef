"""`sfttrain chat DIR`: what is loaded, what the model is shown, and how a conversation runs."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from sftprep.errors import ConfigError, InputNotFound, MismatchError, TemplateError, TokenizerError
from sfttrain.chat.session import Answer, ChatSession
from sfttrain.chat.trained_model import TrainedModel, load_trained_model
from sfttrain.cli import chat as chat_command
from sfttrain.cli import help_text
from sfttrain.cli.chat import ChatConfig
from sfttrain.cli.main import main
from tests.support import at_most

CPU = torch.device("cpu")
GREEDY = ("--temperature", "0", "--max-new-tokens", "12")


def load(folder: Path, **more: Any) -> TrainedModel:
    return load_trained_model(str(folder), device=CPU, **more)


def expected_answer(model: Any, tokenizer: Any, messages: list[dict[str, str]], tokens: int) -> str:
    """Return the greedy answer, computed one token at a time."""
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    start = len(ids)
    with torch.no_grad():
        while len(ids) < start + tokens and (len(ids) == start or ids[-1] != 2):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return tokenizer.decode(ids[start:], skip_special_tokens=True)


@pytest.fixture(scope="module")
def adapter(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an adapter on `model`, with the tokenizer."""
    folder = tmp_path_factory.mktemp("adapter")
    save_adapter(model, folder, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    return folder


def save_adapter(base: Path, folder: Path, config: LoraConfig, *, rows: int | None = None) -> Any:
    """Save an adapter with random weights, and return its model."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(base)
    if rows is not None:
        model.resize_token_embeddings(rows)
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                parameter.normal_(0.0, 0.2 if "lora" in name else 1.0)
    adapted.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return adapted.eval()


# ---- what is loaded ----


def test_the_answer_is_that_of_the_model_on_its_own_template(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["chat", str(model), "--prompt", "Hello", "--system", "Be short.", *GREEDY]) == 0
    loaded = AutoModelForCausalLM.from_pretrained(model).eval()
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Hello"},
    ]
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert capsys.readouterr().out == expected_answer(loaded, tokenizer, messages, 12) + "\n"


def test_an_adapter_answers_on_the_base_model_that_it_names(
    adapter: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["chat", str(adapter), "--prompt", "Hello", *GREEDY]) == 0
    tokenizer = AutoTokenizer.from_pretrained(model)
    base = AutoModelForCausalLM.from_pretrained(model)
    messages = [{"role": "user", "content": "Hello"}]
    without = expected_answer(base.eval(), tokenizer, messages, 12)
    adapted = PeftModel.from_pretrained(base, str(adapter)).eval()
    expected = expected_answer(adapted, tokenizer, messages, 12)
    assert capsys.readouterr().out == expected + "\n"
    assert expected != without


def test_a_moved_base_model_is_named_with_a_flag(
    adapter: Path, model: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "adapter"
    shutil.copytree(adapter, moved)
    config = json.loads((moved / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "gone")
    (moved / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InputNotFound, match="base model of the adapter") as caught:
        load(moved)
    assert 'model="FOLDER_OR_NAME"' in caught.value.remedy
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        logits = [load(folder, base=str(model)).model(ids).logits for folder in (moved, adapter)]
    assert torch.equal(*logits)


@pytest.mark.parametrize("in_full", [True, False])
def test_the_embedding_of_new_tokens_is_grown(in_full: bool, model: Path, tmp_path: Path) -> None:
    trained: dict[str, Any] = (
        {"modules_to_save": ["embed_tokens", "lm_head"]}
        if in_full
        else {"trainable_token_indices": {"embed_tokens": [600, 601], "lm_head": [600, 601]}}
    )
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], **trained)
    # A full embedding may have more rows than the tokenizer has tokens.
    expected = save_adapter(model, tmp_path, config, rows=640 if in_full else 602)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["<new>", "<newer>"])
    tokenizer.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    ids = torch.tensor([[3, 600, 4, 601, 5]])
    with torch.no_grad():
        difference = loaded.model(ids).logits - expected(ids).logits
    assert difference[..., [*range(600), 600, 601]].abs().max() < 1e-5


@pytest.mark.parametrize(
    ("files", "kind", "message", "remedy"),
    [
        ((), InputNotFound, "neither a model", "output_dir"),
        (("config.json", "model.safetensors"), TokenizerError, "no tokenizer", "copy the files"),
        (("*.json", "*.safetensors"), TemplateError, "no chat template", "FILE.jinja"),
    ],
)
def test_a_missing_part_is_an_error_with_a_remedy(
    files: tuple[str, ...],
    kind: type[Exception],
    message: str,
    remedy: str,
    model: Path,
    tmp_path: Path,
) -> None:
    for pattern in files:
        for file in model.glob(pattern):
            shutil.copy(file, tmp_path)
    with pytest.raises(kind, match=message) as caught:
        load(tmp_path)
    assert remedy in caught.value.remedy


def test_a_template_can_be_specified(model: Path, tmp_path: Path) -> None:
    for file in model.glob("*.*"):
        if file.suffix != ".jinja":
            shutil.copy(file, tmp_path)
    template = tmp_path / "own.txt"
    template.write_text("{{ messages[0].content }}")
    assert load(tmp_path, chat_template=str(template)).tokenizer.chat_template.startswith("{{")
    with pytest.raises(TemplateError, match="cannot be read"):
        load(tmp_path, chat_template=str(tmp_path / "none"))


def test_the_error_for_a_folder_without_a_model_names_its_checkpoint(
    model: Path, tmp_path: Path
) -> None:
    shutil.copytree(model, tmp_path / "checkpoint-5")
    with pytest.raises(InputNotFound) as caught:
        load(tmp_path)
    assert caught.value.remedy == f"specify {tmp_path / 'checkpoint-5'}"
    with pytest.raises(InputNotFound, match="does not exist"):
        load(tmp_path / "nowhere")


def test_an_adapter_of_another_model_and_misplaced_settings_are_refused(
    adapter: Path, model: Path, tmp_path: Path
) -> None:
    from tests.sfttrain.tiny import tiny_model

    tiny_model("llama", vocab_size=600, hidden_size=64).save_pretrained(tmp_path)
    with pytest.raises(MismatchError, match="does not fit"):
        load(adapter, base=str(tmp_path))
    with pytest.raises(ConfigError, match="whole model"):
        load(model, base=str(tmp_path))
    with pytest.raises(ConfigError, match="which the adapter names"):
        load(adapter, trust_remote_code=True)
    # The code of a model on the Hub needs a commit.
    with pytest.raises(ConfigError, match="may change") as caught:
        load(adapter, base="org/model", trust_remote_code=True)
    assert "model_revision" in caught.value.remedy


# ---- conversations ----


@pytest.fixture(scope="module")
def trained(model: Path) -> TrainedModel:
    return load(model)


def test_an_answer_is_written_in_pieces_while_it_is_generated(trained: TrainedModel) -> None:
    pieces: list[str] = []
    session = ChatSession(trained, max_new_tokens=40, temperature=0)
    answer = session.ask("Hello", pieces.append)
    assert len(pieces) > 2
    assert "".join(pieces) == answer.answer
    assert (answer.answer_tokens, answer.end) == (40, "length")


def test_a_turn_is_shown_the_turns_before_it_until_a_reset(trained: TrainedModel) -> None:
    session = ChatSession(trained, system="Be short.", max_new_tokens=5, temperature=0)
    first = session.ask("Hello", lambda _: None)
    second = session.ask("And then?", lambda _: None)
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": first.answer},
        {"role": "user", "content": "And then?"},
    ]
    assert second.answer == expected_answer(trained.model, trained.tokenizer, messages, 5)
    session.reset()
    assert session.ask("Hello", lambda _: None) == first


def test_an_end_token_ends_the_answer(trained: TrainedModel, model: Path) -> None:
    ending = AutoModelForCausalLM.from_pretrained(model).eval()
    session = ChatSession(dataclasses.replace(trained, model=ending), temperature=0)
    with torch.no_grad():
        ending.lm_head.weight.zero_()
        ending.lm_head.bias = torch.nn.Parameter(torch.eye(600)[2])  # <|im_end|>, always
    answer = session.ask("Hello", lambda _: None)
    assert (answer.answer, answer.answer_tokens, answer.end) == ("", 1, "end")


def test_an_interrupted_answer_stays_in_the_conversation(trained: TrainedModel) -> None:
    session = ChatSession(trained, max_new_tokens=200, temperature=0)
    pieces: list[str] = []

    def write(text: str) -> None:
        pieces.append(text)
        if len(pieces) == 3:
            raise KeyboardInterrupt

    answer = session.ask("Hello", write)
    assert answer.end == "interrupted"
    assert answer.answer == "".join(pieces)
    following = session.ask("Go on", lambda _: None)
    assert following.prompt_tokens > answer.prompt_tokens + 10


def test_a_conversation_beyond_the_context_is_an_error(trained: TrainedModel) -> None:
    session = ChatSession(trained, max_new_tokens=5)
    with pytest.raises(ConfigError, match="positions end at 4,096") as caught:
        session.ask("word " * 4096, lambda _: None)
    assert "/reset" in caught.value.remedy
    assert session.ask("Hello", lambda _: None).prompt_tokens < 30  # it is not remembered


def test_a_template_that_refuses_the_conversation_is_an_error(trained: TrainedModel) -> None:
    trained.tokenizer.chat_template, before = (
        "{{ raise_exception('no system message') }}",
        trained.tokenizer.chat_template,
    )
    try:
        with pytest.raises(TemplateError, match="no system message") as caught:
            ChatSession(trained, system="x").ask("Hello", lambda _: None)
    finally:
        trained.tokenizer.chat_template = before
    assert "system" in caught.value.remedy


# ---- the command ----


def test_lines_of_a_pipe_are_one_conversation_with_commands(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n\nAnd then?\n/reset\nHello\n/exit\nNo\n"))
    assert main(["chat", str(model), "--json", *GREEDY]) == 0
    printed = capsys.readouterr()
    first, second, third = (json.loads(line) for line in printed.out.splitlines())
    assert first == third
    assert list(first) == ["prompt", "answer", "prompt_tokens", "answer_tokens", "end"]
    assert second["prompt_tokens"] > first["prompt_tokens"] + first["answer_tokens"]


def test_a_prompt_can_be_read_from_stdin(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("two\nlines"))
    assert main(["chat", str(model), "--json", "--prompt", "-", *GREEDY]) == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == "two\nlines"


@pytest.mark.parametrize(
    ("arguments", "message", "remedy"),
    [
        ([], "DIR is missing", "sfttrain chat DIR"),
        (["A", "B"], "only one DIR", "sfttrain chat DIR"),
        (["A", "--temprature", "1"], "unknown option --temprature", "--temperature"),
        (["A", "--temperature", "-1"], "--temperature is -1.0", "0.7"),
        (["A", "--max-new-tokens", "0"], "--max_new_tokens is 0", "at least 1"),
        (["/nowhere"], "does not exist", "output_dir"),
    ],
)
def test_errors_of_the_command(
    arguments: list[str], message: str, remedy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["chat", *arguments]) == 2
    error, advice = capsys.readouterr().err.strip().splitlines()[-2:]
    assert message in error
    assert remedy in advice


def test_help_has_every_setting_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "--help"]) == 0
    printed = capsys.readouterr().out
    stated = {name: default for name, default, _ in help_text.CHAT if name != "debug"}
    assert stated == {
        field.name: "" if field.default is None else str(field.default)
        for field in dataclasses.fields(ChatConfig)
    }
    assert all(f"--{name} " in printed for name in stated)


def test_control_characters_are_visible_on_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    chat_command._write_visibly("a\x1b]0;title\x07\tb\n👩\u200d🚀")
    assert capsys.readouterr().out == "a\\x1b]0;title\\x07\tb\n👩\u200d🚀"


@pytest.mark.parametrize(
    ("tokens", "end", "note"),
    [
        (3, "length", "cut at --max_new_tokens 3"),
        (2, "length", "cut at the context of the model"),
        (None, "interrupted", "interrupted"),
        (2, "end", ""),
    ],
)
def test_the_note_at_an_end_names_what_ended_it(tokens: int | None, end: str, note: str) -> None:
    answer = Answer(answer="Hi", prompt_tokens=5, answer_tokens=tokens, end=end)
    assert chat_command._describe_end(answer, max_new_tokens=3) == note


@pytest.mark.slow
def test_ctrl_c_on_a_terminal_ends_the_answer_and_not_the_program(model: Path) -> None:
    controller, terminal = pty.openpty()
    code = "import sys; from sfttrain.cli.main import main; sys.exit(main(sys.argv[1:]))"
    command = ["chat", str(model), "--max_new_tokens", "4000", "--temperature", "0"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *command],
        stdin=terminal,
        stdout=terminal,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    os.close(terminal)
    screen = Screen(controller)
    try:
        with at_most(240):  # imports take half a minute on a busy machine
            assert "/exit: end" in screen.read_until("\n> ")
            screen.type("Hello\n")
            screen.read_until("Hello\n")
            screen.read_until(" ")  # the first word of the answer
            process.send_signal(signal.SIGINT)
            screen.read_until("\n> ")
            screen.type("/reset\n")
            screen.read_until("new conversation\n\n> ")
            process.send_signal(signal.SIGINT)
            screen.read_until("ends the program\n> ")
            screen.type("/exit\n")
            assert process.wait() == 0
    finally:
        process.kill()
        process.wait()
        os.close(controller)


class Screen:
    """The output of a program on a terminal, and its keyboard."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._unread = ""

    def read_until(self, text: str) -> str:
        """Return the output up to the end of a text, which is awaited."""
        while text not in self._unread:
            output = os.read(self._descriptor, 1000).decode(errors="replace")
            self._unread += output.replace("\r", "")
        before, _, self._unread = self._unread.partition(text)
        return before + text

    def type(self, text: str) -> None:
        os.write(self._descriptor, text.encode())
