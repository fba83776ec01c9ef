"""`train_roles` trains the same tokens as a switch in each message."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import sftprep
from sftprep.config import BuildConfig, FormatConfig
from sftprep.errors import ConfigError
from sftprep.stream import open_stream
from tests.conftest import EXAMPLES
from tests.sfttrain.trainer_factory import sequences

PLAIN = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] }}"
    "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MARKED = (EXAMPLES / "chatml.jinja").read_text(encoding="utf-8")
ROWS = [
    {
        "messages": [
            *([{"role": "system", "content": "Be short."}] if number % 2 else []),
            {"role": "user", "content": f"What is {number} plus one?"},
            {"role": "assistant", "content": f"It is {number + 1}."},
            {"role": "user", "content": "Thanks for " + "really " * number + "nothing!"},
            {"role": "assistant", "content": "Ok. Ok."},
        ]
    }
    for number in range(6)
]


def switched(rows: list[Any], roles: tuple[str, ...]) -> list[Any]:
    """Return conversations in which each message says whether it is trained."""
    return [
        {"messages": [{**m, "train": m["role"] in roles} for m in row["messages"]]} for row in rows
    ]


@pytest.mark.parametrize(
    ("template", "roles"),
    [
        (PLAIN, ("user",)),
        (PLAIN, ("user", "assistant")),
        (PLAIN, ("system", "assistant")),
        (MARKED, ("user",)),
        (MARKED, ("user", "assistant")),
    ],
)
def test_roles_are_switches_in_all_messages(
    roles: tuple[str, ...], template: str, folder_with: Callable[[str], Path], tmp_path: Path
) -> None:
    tokenizer = str(folder_with(template))
    common: dict[str, Any] = {"tokenizer": tokenizer, "max_length": 256, "workers": 1}
    sftprep.build(ROWS, output=tmp_path / "a", train_roles=roles, **common)
    sftprep.build(switched(ROWS, roles), output=tmp_path / "b", train_on="assistant", **common)
    found = sequences(sftprep.open_shards(tmp_path / "a"))
    assert found == sequences(sftprep.open_shards(tmp_path / "b"))
    assert sum(sum(mask) for _, mask in found) > 0
    texts = trained_texts(found, Path(tokenizer))
    assert ("What is 0 plus one?<|im_end|>" in texts) == ("user" in roles)
    assert ("It is 1.<|im_end|>" in texts) == ("assistant" in roles)
    assert ("Be short.<|im_end|>" in texts) == ("system" in roles)


def trained_texts(found: list[tuple[list[int], list[bool]]], tokenizer: Path) -> list[str]:
    """Return the trained runs of tokens, without whitespace around them."""
    from tokenizers import Tokenizer

    decoder, texts = Tokenizer.from_file(str(tokenizer / "tokenizer.json")), []
    for ids, mask in found:
        run: list[int] = []
        for token, trained in zip([*ids, 0], [*mask, False], strict=True):
            if trained:
                run.append(token)
            elif run:
                texts.append(decoder.decode(run, skip_special_tokens=False).strip())
                run = []
    return texts


def test_the_assistant_alone_is_train_on_assistant(tokenizer_dir: Path, tmp_path: Path) -> None:
    common: dict[str, Any] = {"tokenizer": str(tokenizer_dir), "max_length": 256, "workers": 1}
    sftprep.build(ROWS, output=tmp_path / "a", train_roles="assistant", **common)
    sftprep.build(ROWS, output=tmp_path / "b", train_on="assistant", **common)
    assert sequences(sftprep.open_shards(tmp_path / "a")) == sequences(
        sftprep.open_shards(tmp_path / "b")
    )


def test_a_switch_of_the_record_takes_precedence(tokenizer_dir: Path, tmp_path: Path) -> None:
    rows = json.loads(json.dumps(ROWS))
    for row in rows:
        row["messages"][-2]["train"] = False
    sftprep.build(
        rows, output=tmp_path / "a", train_roles="user", tokenizer=str(tokenizer_dir), workers=1
    )
    texts = trained_texts(sequences(sftprep.open_shards(tmp_path / "a")), tokenizer_dir)
    assert len(texts) == len(rows)
    assert all(text.startswith("What is") for text in texts)


def test_streams_and_sources_have_it_too(
    tokenizer_dir: Path, tmp_path: Path, records: Callable[..., str]
) -> None:
    path = records(ROWS)
    settings: dict[str, Any] = {"tokenizer": str(tokenizer_dir), "max_length": 256}
    sftprep.build(path, output=tmp_path / "a", train_roles="user", workers=1, **settings)
    expected = sequences(sftprep.open_shards(tmp_path / "a"))
    assert sequences(open_stream(path, train_roles="user", **settings)) == expected
    source = {"path": path, "train_roles": ["user"]}
    sftprep.build(output=tmp_path / "b", sources=[source], workers=1, **settings)
    assert sequences(sftprep.open_shards(tmp_path / "b")) == expected


@pytest.mark.parametrize(
    "settings",
    [
        {"train_roles": "narrator"},
        {"train_roles": "user", "train_on": "all"},
        {"train_roles": "user", "train_on": "last-assistant"},
        {"train_roles": "user", "reasoning": "expand"},
    ],
)
def test_what_is_not_compatible(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="train_roles"):
        FormatConfig(**settings)
    assert BuildConfig.of(train_roles="user, assistant").format.train_roles == ("user", "assistant")
