"""Chat templates for these tests."""

from __future__ import annotations

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] +"
    " '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n'"
    " }}{% endif %}"
)
"""A template without marks."""

FORGETFUL = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}{% if"
    " message.reasoning_content is defined and loop.last %}<think>{{ message.reasoning_content"
    " }}</think>{% endif %}{{ message.content + '<|im_end|>\n' }}{% endfor %}{% if"
    " add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""A template that shows the reasoning of the last turn only."""
