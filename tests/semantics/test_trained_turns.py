"""`train_roles` trains what a switch in each message trains; `train_end` excludes end tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import sftprep
from sftprep.chat_template.assistant_spans import TurnSpan
from sftprep.config import BuildConfig, FormatConfig
from sftprep.errors import ConfigError
from sftprep.render.turn_ends import TurnEnds
from sftprep.stream import open_stream
from tests.conftest import EXAMPLES
from tests.sfttrain.trainer_factory import sequences

PLAIN = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] }}"
    "{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
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


# --- the tokens that end turns --------------------------------------------------------------------


def without_ends(ids: list[int], mask: list[bool], end: int, *, keeps_last: bool) -> list[bool]:
    """Return the mask of a sequence without its trained end tokens, but perhaps the last one."""
    ends = [n for n, token in enumerate(ids) if token == end and mask[n]]
    excluded = set(ends[:-1] if keeps_last else ends)
    return [trained and n not in excluded for n, trained in enumerate(mask)]


@pytest.mark.parametrize("template", [PLAIN, MARKED], ids=["derived", "marked"])
@pytest.mark.parametrize("which", ["last", "none"])
@pytest.mark.parametrize("roles", [(), ("user", "assistant")])
def test_only_end_tokens_are_excluded(
    which: str,
    roles: tuple[str, ...],
    template: str,
    folder_with: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    tokenizer = folder_with(template)
    rows = [row for row in ROWS if template == PLAIN or row["messages"][0]["role"] != "system"]
    common: dict[str, Any] = {"tokenizer": str(tokenizer), "max_length": 256, "workers": 1}
    common |= {"train_on": "assistant", "train_roles": roles}
    sftprep.build(rows, output=tmp_path / "turn", **common)
    sftprep.build(rows, output=tmp_path / which, train_end=which, **common)
    end = sftprep.read_manifest(tmp_path / "turn").tokenizer["eos_token_id"]
    turn = sequences(sftprep.open_shards(tmp_path / "turn"))
    assert all(sum(token == end for token in ids) >= 4 for ids, _ in turn)
    expected = [
        (ids, without_ends(ids, mask, end, keeps_last=which == "last")) for ids, mask in turn
    ]
    assert sequences(sftprep.open_shards(tmp_path / which)) == sorted(expected)
    assert sorted(expected) != turn


def test_ends_of_adjacent_turns_and_of_turns_in_parts(tokenizer_dir: Path) -> None:
    """Of a turn in several parts, only the last one has an end; a content is not cut."""
    text = "Hi<|im_start|>Yes<|im_end|> well<|im_end|>  tail"
    spans = [TurnSpan(0, 14, 0), TurnSpan(14, 27, 1), TurnSpan(27, 44, 1), TurnSpan(44, 48, 2)]
    tokenizer = sftprep.load_tokenizer(str(tokenizer_dir))

    def excluded(trained: Any, number: int) -> list[str]:
        found = TurnEnds(tokenizer, trained).find_excluded(spans[:number], text)
        assert all(weight == 0 for _, _, weight in found)
        return [text[first:last] for first, last, _ in found]

    assert excluded("none", 4) == ["<|im_start|>", "<|im_end|>  "]
    assert excluded("last", 3) == ["<|im_start|>"]
    assert excluded("turn", 4) == []


def test_characters_of_several_tokens_before_an_end_stay_trained(
    tokenizer_dir: Path, tmp_path: Path
) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "好"}]}
    ]
    common: dict[str, Any] = {"tokenizer": str(tokenizer_dir), "workers": 1}
    common |= {"train_on": "assistant"}
    sftprep.build(rows, output=tmp_path / "turn", **common)
    sftprep.build(rows, output=tmp_path / "none", train_end="none", **common)
    ((ids, turn),) = sequences(sftprep.open_shards(tmp_path / "turn"))
    ((_, none),) = sequences(sftprep.open_shards(tmp_path / "none"))
    end = sftprep.read_manifest(tmp_path / "turn").tokenizer["eos_token_id"]
    assert none == without_ends(ids, turn, end, keeps_last=False)
    assert sum(none) >= 2


def test_a_weight_of_the_record_stays(tokenizer_dir: Path, tmp_path: Path) -> None:
    rows = json.loads(json.dumps(ROWS[:1]))
    for message in rows[0]["messages"]:
        message["weight"] = 0.5 if message["role"] == "assistant" else 0
    sftprep.build(
        rows,
        output=tmp_path / "b",
        train_on="assistant",
        train_end="none",
        tokenizer=str(tokenizer_dir),
        workers=1,
    )
    (pack,) = sftprep.open_shards(tmp_path / "b")
    end = sftprep.read_manifest(tmp_path / "b").tokenizer["eos_token_id"]
    assert pack.loss_weights is not None
    assert set(pack.loss_weights.tolist()) == {0.0, 0.5}
    assert not pack.completion_mask[pack.input_ids == end].any()


@pytest.mark.parametrize(
    "settings",
    [
        {"train_end": "all"},
        {"train_end": "none"},
        {"train_end": "none", "train_on": "completion"},
        {"train_end": "last", "train_on": "assistant", "reasoning": "expand"},
    ],
)
def test_train_end_needs_trained_turns(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"train_end (needs trained turns|is)"):
        FormatConfig(**settings)


@pytest.mark.parametrize("setting", [{"train_roles": "user"}, {"train_end": "none"}])
@pytest.mark.parametrize(
    "row", [{"input_ids": [5, 6], "labels": [-100, 6]}, {"prompt": "a", "completion": "b"}]
)
def test_records_without_turns_are_refused(
    setting: dict[str, str], row: dict[str, Any], tokenizer_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(setting))}: .*not rendered as turns"):
        sftprep.build(
            [row] * 3,
            tokenizer=str(tokenizer_dir),
            output=tmp_path / "b",
            train_on="assistant",
            workers=1,
            **setting,
        )
