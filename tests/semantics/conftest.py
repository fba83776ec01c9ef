"""Tokenizer folders for these tests: the one made on the spot, with other templates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Without marks."""

FORGETFUL = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.reasoning_content is defined and loop.last %}<think>{{ message.reasoning_content }}</think>{% endif %}"
    "{{ message.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Shows the reasoning of the last turn only."""


@pytest.fixture
def folder_with(tokenizer_dir: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A folder with the tokenizer made on the spot and the chat template given."""

    def make(template: str) -> Path:
        folder = tmp_path / "tokenizer"
        folder.mkdir(exist_ok=True)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).write_bytes((tokenizer_dir / name).read_bytes())
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
        return folder

    return make
