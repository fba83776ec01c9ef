"""Content that the chat template drops: counted with its line, or a reason to reject the record."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest

import sftprep
from sftprep.config.validation import SeriousOmission
from sftprep.core.omissions import OMISSION_KINDS
from sftprep.core.types import Flag
from sftprep.errors import ConfigError, FlagNames, TooManyRejected
from sftprep.report.draw import draw_pack
from sftprep.shards import data_warnings
from sftprep.shards.warning_kinds import describe_warnings
from sftprep.sources.partition import PARTITION_BYTES
from sftprep.stream import open_stream
from tests.support import rejected_file

# Shows the content of users and of the assistant, the names of calls, and the reasoning of the last
# turn.
TEMPLATE = (
    "{% for m in messages if m.role in ['user', 'assistant', 'tool'] %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content and loop.last %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{% if m.tool_calls %}{% for c in m.tool_calls %}[{{ c.function.name }}]{% endfor %}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
)
QUESTION = {"role": "user", "content": "How many boats are in the harbour?"}
ANSWER = {"role": "assistant", "content": "There are four of them."}


def calling(content: str = "", **arguments: Any) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": "count_boats", "arguments": arguments}}
    return {"role": "assistant", "content": content, "tool_calls": [call]}


RESULT = {"role": "tool", "content": "four boats"}
OMITTING: dict[str, list[dict[str, Any]]] = {
    "message_not_shown": [{"role": "developer", "content": "Answer briefly."}, QUESTION, ANSWER],
    "reasoning_not_shown": [
        QUESTION,
        {**ANSWER, "reasoning_content": "Two and two."},
        QUESTION,
        ANSWER,
    ],
    "argument_not_shown": [QUESTION, calling(harbour="Husum"), RESULT, ANSWER],
    "text_with_call_not_shown": [QUESTION, calling("Let me look at the harbour."), RESULT, ANSWER],
    "name_not_shown": [{**QUESTION, "name": "Ida"}, ANSWER],
    "key_not_shown": [QUESTION, {**ANSWER, "refusal": "I would rather not."}],
}


@pytest.fixture
def build(
    records: Callable[..., str], folder_with: Callable[[str], Path], tmp_path: Path
) -> Callable[..., sftprep.BuildReport]:
    def run(*conversations: list[dict[str, Any]], **settings: Any) -> sftprep.BuildReport:
        data = records([{"messages": messages} for messages in conversations])
        output = settings.pop("output", tmp_path / "out")
        return sftprep.build(
            data, tokenizer=folder_with(TEMPLATE), output=output, workers=1, **settings
        )

    return run


@pytest.mark.parametrize("kind", OMITTING)
def test_an_omission_is_counted_with_its_first_line(build: Any, kind: str) -> None:
    manifest = build([QUESTION, ANSWER], OMITTING[kind], OMITTING[kind]).manifest
    assert {
        name: n for name, n in manifest.accounting.warnings.items() if name in OMISSION_KINDS
    } == {kind: 2}
    found = next(found for found in data_warnings(manifest) if found.kind == kind)
    assert found.file == manifest.inputs[0].path
    assert found.line == 2
    assert "(2 records, first in " in found.render(FlagNames())


def test_reasoning_of_the_last_turn_is_shown(build: Any) -> None:
    manifest = build([QUESTION, {**ANSWER, "reasoning_content": "Two and two."}]).manifest
    assert manifest.accounting.warnings == {}


@pytest.mark.parametrize("kind", OMITTING)
def test_an_omission_rejects_the_record_under_quarantine_unless_it_is_allowed(
    build: Any, kind: str, tmp_path: Path
) -> None:
    conversations = [[QUESTION, ANSWER], OMITTING[kind]]
    settings: dict[str, Any] = {"on_bad_record": "quarantine", "quality_checks": "keep"}
    accounting = build(*conversations, max_rejected="100%", **settings).manifest.accounting
    # Earlier reasoning and names are only counted.
    is_fatal = kind not in ("reasoning_not_shown", "name_not_shown", "key_not_shown")
    assert accounting.rejected == ({kind: 1} if is_fatal else {})
    assert accounting.warnings == ({} if is_fatal else {kind: 1})
    if is_fatal:
        with pytest.raises(TooManyRejected, match=f'allow_loss="{kind}"'):
            build(*conversations, output=tmp_path / "few", **settings)
        line = json.loads(rejected_file(tmp_path / "out").read_text())
        assert (line["line"], line["reason"]) == (2, kind)
        accounting = build(
            *conversations, output=tmp_path / "allowed", allow_loss=kind, **settings
        ).manifest.accounting
        # The template never shows text alongside a call, which is counted too.
        never = {"template_without_text_with_call": 1} if kind.startswith("text_with") else {}
        assert (accounting.rejected, accounting.warnings) == ({}, {kind: 1} | never)


def test_reasoning_of_the_last_turn_that_is_omitted_rejects_the_record(
    records: Any, folder_with: Any, tmp_path: Path
) -> None:
    reasoned = {**ANSWER, "thinking": "Two and two."}
    rows = [[QUESTION, reasoned, QUESTION, ANSWER], [QUESTION, ANSWER, QUESTION, reasoned]]
    data = records([{"messages": messages} for messages in rows])
    manifest = sftprep.build(
        data,
        tokenizer=folder_with(TEMPLATE.replace("m.reasoning_content and loop.last", "false")),
        output=tmp_path / "out",
        workers=1,
        on_bad_record="quarantine",
        max_rejected="100%",
    ).manifest
    assert manifest.accounting.rejected == {"reasoning_not_shown": 1}
    assert manifest.inputs[0].first_lines == {
        "warnings.reasoning_not_shown": 1,
        "warnings.template_without_reasoning": 1,
    }


REASONED = {**ANSWER, "reasoning_content": "Two and two."}
TAGGED = {**ANSWER, "content": "<think>\nTwo and two.\n</think>\n\nFour."}
CUTTING = TEMPLATE.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")
"""A template that shows reasoning under a key, and not in tags."""


@pytest.mark.parametrize(
    ("template", "turn", "settings", "advised"),
    [
        (TEMPLATE, REASONED, {}, ["--reasoning keep"]),
        (CUTTING, REASONED, {}, ["--reasoning keep"]),
        (CUTTING, TAGGED, {}, ["--chat-template FILE"]),
        (TEMPLATE.replace("loop.last", "false"), REASONED, {}, ["--chat-template FILE"]),
        (
            TEMPLATE.replace("loop.last", "false"),
            REASONED,
            {"reasoning": "keep", "train_on": "assistant"},
            ["--chat-template FILE"],
        ),
        (TEMPLATE.replace("loop.last", "m.tool_calls"), REASONED, {}, ["--reasoning keep"]),
    ],
)
def test_the_advice_for_missing_reasoning_helps_with_the_template(
    template: str,
    turn: Any,
    settings: Any,
    advised: list[str],
    records: Any,
    folder_with: Any,
    tmp_path: Path,
) -> None:
    data = records([{"messages": [QUESTION, turn, QUESTION, ANSWER]}])
    manifest = sftprep.build(
        data, tokenizer=folder_with(template), output=tmp_path / "out", workers=1, **settings
    ).manifest
    texts = [warning.render(FlagNames()) for warning in data_warnings(manifest)]
    reasons = [text for text in texts if "reasoning" in text]
    assert "drops reasoning" in reasons[0]
    flags = ("--reasoning keep", "--chat-template FILE")
    assert [flag for text in reasons for flag in flags if flag in text] == advised


SHOWS_TEXT_OF_LAST = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if loop.last or not m.tool_calls %}"
    "{{ m.content }}{% endif %}{% for c in m.tool_calls or [] %}{{ c.function.name }} "
    "{{ c.function.arguments | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "settings", "advised"),
    [
        (SHOWS_TEXT_OF_LAST, {}, ["--reasoning keep"]),
        (SHOWS_TEXT_OF_LAST, {"reasoning": "drop"}, []),
        (SHOWS_TEXT_OF_LAST.replace("loop.last or", ""), {}, ["--chat-template FILE"]),
    ],
)
def test_the_advice_for_missing_text_alongside_calls_helps_with_the_template(
    template: str,
    settings: Any,
    advised: list[str],
    records: Any,
    folder_with: Any,
    tmp_path: Path,
) -> None:
    talk = [QUESTION, calling("Let me look at the harbour.", harbour="Husum"), RESULT, ANSWER]
    data, tokenizer = records([{"messages": talk}]), folder_with(template)

    def warnings_with(**settings: Any) -> list[str]:
        output = tmp_path / str(settings)
        report = sftprep.build(data, tokenizer=tokenizer, output=output, workers=1, **settings)
        return [warning.render(FlagNames()) for warning in data_warnings(report.manifest)]

    texts = warnings_with(**settings)
    assert "drops the text alongside" in texts[0]
    flags = ("--reasoning keep", "--chat-template FILE")
    assert [flag for text in texts for flag in flags if flag in text] == advised
    if advised == ["--reasoning keep"]:
        assert not any("alongside" in text for text in warnings_with(reasoning="keep"))


@pytest.mark.parametrize(
    ("variables", "number"),
    [
        ({"mood": "calm"}, 0),
        ({"mood": "calm", "other": 1}, 1),
        ({"other": False}, 1),
        ({"other": None}, 0),
        ({}, 0),
        (None, 0),
    ],
)
@pytest.mark.parametrize("reasoning", ["template", "expand"])
def test_a_variable_that_the_template_does_not_read_is_counted(
    variables: Any, number: int, reasoning: str, records: Any, folder_with: Any, tmp_path: Path
) -> None:
    rows = [{"messages": [QUESTION, ANSWER]} for _ in range(3)]
    rows[2]["chat_template_kwargs"] = variables
    reading = "{% if mood is defined %}{{ mood }}{% endif %}" + TEMPLATE
    manifest = sftprep.build(
        records(rows),
        tokenizer=folder_with(reading),
        output=tmp_path / "out",
        workers=1,
        reasoning=reasoning,
    ).manifest
    kind = "template_kwarg_not_read"
    assert manifest.accounting.warnings.get(kind, 0) == number
    if number:
        assert manifest.locate_warning(kind) == (manifest.inputs[0].path, 3)
        (found,) = [item for item in data_warnings(manifest) if item.kind == kind]
        text = found.render(FlagNames())
        assert "does not read a variable in chat_template_kwargs (1 record, first in " in text


def test_the_first_line_counts_the_lines_of_all_partitions(build: Any) -> None:
    long = [{**QUESTION, "content": "How many boats? " * 10_000}, ANSWER]
    report = build(*[long] * 30, OMITTING["message_not_shown"])
    assert report.bytes_read > PARTITION_BYTES
    assert report.manifest.inputs[0].first_lines["warnings.message_not_shown"] == 31


def test_an_unknown_kind_cannot_be_allowed(build: Any) -> None:
    with pytest.raises(ConfigError, match="allow_loss is 'tools'"):
        build([QUESTION, ANSWER], allow_loss="tools")


def test_the_kinds_that_reject_are_kinds_of_omissions() -> None:
    assert set(get_args(SeriousOmission)) == OMISSION_KINDS.keys() - {
        "tools_not_shown",
        "name_not_shown",
        "key_not_shown",
    }


def test_a_stream_logs_each_kind_once(
    records: Any, folder_with: Any, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [[QUESTION, ANSWER], OMITTING["message_not_shown"], OMITTING["message_not_shown"]]
    data = records([{"messages": messages} for messages in rows])
    with caplog.at_level(logging.WARNING, logger="sftprep"):
        packs = list(open_stream(data, tokenizer=str(folder_with(TEMPLATE)), lanes=1))
    assert sum(len(pack.seq_lengths) for pack in packs) == 3
    logged = [r.getMessage() for r in caplog.records if "drops the content" in r.getMessage()]
    assert len(logged) == 1
    assert logged[0].endswith(f"first in {data}:2)")


def test_the_sequences_with_omissions_are_flagged(build: Any, tmp_path: Path) -> None:
    build([QUESTION, ANSWER], OMITTING["message_not_shown"], [QUESTION, ANSWER])
    shards = sftprep.open_shards(tmp_path / "out")
    found = [
        (int(origin), int(flag))
        for pack in shards
        for origin, flag in zip(pack.origin, pack.flags, strict=True)  # type: ignore[arg-type]
    ]
    assert sorted(found) == [(0, 0), (1, Flag.CONTENT_NOT_SHOWN), (2, 0)]
    assert sftprep.verify(tmp_path / "out").problems == []
    lines = draw_pack(shards[0], 0, shards.manifest, str, color=False, full=True)
    assert sum("dropped a part of the record" in line for line in lines) == 1


def test_without_an_omission_no_sequence_has_a_flag(build: Any, tmp_path: Path) -> None:
    build([QUESTION, ANSWER])
    assert [pack.flags.tolist() for pack in sftprep.open_shards(tmp_path / "out")] == [[0]]


@pytest.mark.parametrize("extra", [{"id": "a b1"}, {"date": "2024-07-26 10:00"}, {"score": 5}])
def test_ids_dates_and_numbers_of_messages_need_not_be_shown(build: Any, extra: Any) -> None:
    assert build([QUESTION, {**ANSWER, **extra}]).manifest.accounting.warnings == {}


def test_text_with_a_call_is_judged_in_the_sequence_of_its_turn(
    records: Any, folder_with: Any, tmp_path: Path
) -> None:
    shows_last = SHOWS_TEXT_OF_LAST + (
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    talk = [QUESTION, calling("Let me look at the harbour.", harbour="Husum"), RESULT, ANSWER]
    settings: dict[str, Any] = {
        "reasoning": "expand",
        "workers": 1,
        "on_bad_record": "quarantine",
        "max_rejected": "100%",
    }
    for source, number in ((shows_last, 0), (shows_last.replace("loop.last or", ""), 1)):
        accounting = sftprep.build(
            records([{"messages": talk}, {"messages": [QUESTION, ANSWER]}]),
            tokenizer=folder_with(source),
            output=tmp_path / str(number),
            **settings,
        ).manifest.accounting
        assert accounting.rejected == ({"text_with_call_not_shown": 1} if number else {})
        assert accounting.warnings == {}
    prompted = {"prompt": talk[:3], "completion": talk[3:]}
    accounting = sftprep.build(
        records([prompted, {"prompt": [QUESTION], "completion": [ANSWER]}]),
        tokenizer=folder_with(shows_last),
        output=tmp_path / "prompted",
        **settings,
    ).manifest.accounting
    # The turn of the prompt has no sequence of its own.
    assert accounting.rejected == {"text_with_call_not_shown": 1}


EXPANDED: dict[str, Any] = {"reasoning": "expand", "quality_checks": "keep"}
TRAILING: dict[str, list[dict[str, Any]]] = {
    "user": [{"role": "user", "content": "And in Husum?"}],
    "a word": [{"role": "user", "content": "user"}],
    "tool": [RESULT],
    "system": [{"role": "system", "content": "Answer briefly."}],
    "untrained turn": [QUESTION, {**ANSWER, "weight": 0}],
    "call": [QUESTION, {**calling(), "weight": 0}],
}


@pytest.mark.parametrize("trailing", TRAILING)
def test_messages_after_the_last_expanded_turn_are_counted(
    build: Any, trailing: str, tmp_path: Path
) -> None:
    whole, cut = [QUESTION, ANSWER, QUESTION, ANSWER], [QUESTION, ANSWER, *TRAILING[trailing]]
    manifest = build(whole, cut, cut, **EXPANDED).manifest
    found = {name: n for name, n in manifest.accounting.warnings.items() if "shown" in name}
    assert found == {"message_not_shown": 2}
    assert manifest.locate_warning("message_not_shown") == (manifest.inputs[0].path, 2)
    assert (manifest.accounting.records, manifest.accounting.sequences) == (3, 4)
    flags = [flag for pack in sftprep.open_shards(tmp_path / "out") for flag in pack.flags.tolist()]
    assert sorted(flags) == [0, 0, *[Flag.CONTENT_NOT_SHOWN] * 2]
    # They are not in the prompt of a trained turn, so the other turns are kept.
    settings = {**EXPANDED, "on_bad_record": "quarantine", "overwrite": True}
    accounting = build(whole, cut, cut, **settings).manifest.accounting
    assert (accounting.rejected, accounting.sequences) == ({}, 4)
    assert accounting.warnings["message_not_shown"] == 2


def test_empty_messages_after_the_last_expanded_turn_are_not_counted(build: Any) -> None:
    empty = [QUESTION, ANSWER, {"role": "user", "content": "  "}]
    warnings = build(empty, expand_turns=True).manifest.accounting.warnings
    assert warnings == {"empty_turn": 1}


def test_a_stream_logs_messages_after_the_last_expanded_turn(
    records: Any, folder_with: Any, caplog: pytest.LogCaptureFixture
) -> None:
    path = records([{"messages": [QUESTION, ANSWER, QUESTION]}] * 20)
    with caplog.at_level(logging.WARNING):
        for _ in open_stream(path, tokenizer=str(folder_with(TEMPLATE)), **EXPANDED):
            pass
    (logged,) = [line for line in caplog.messages if "content of a message" in line]
    assert f"{path}:1" in logged


@pytest.mark.parametrize(
    ("kind", "settings", "part", "is_contained"),
    [
        ("reasoning_not_shown", {"reasoning": "template"}, "keeps that of earlier turns", True),
        ("reasoning_not_shown", {"reasoning": "drop"}, "keeps that of earlier turns", False),
        ("reasoning_not_shown", {"reasoning": "keep"}, "keeps that of earlier turns", False),
        ("message_not_shown", {"reasoning": "template"}, "no turn after it is trained", False),
        ("message_not_shown", {"reasoning": "expand"}, "no turn after it is trained", True),
        ("message_not_shown", {"expand_turns": True}, "no turn after it is trained", True),
    ],
)
def test_a_warning_names_only_causes_and_remedies_that_apply(
    kind: str, settings: dict[str, Any], part: str, is_contained: bool
) -> None:
    (warning,) = describe_warnings({kind: 1}, settings, lambda _: None)
    assert (part in warning.render(FlagNames())) == is_contained
