"""Conversations that look wrong are counted in every mode, and rejected where that is requested."""

from __future__ import annotations

import json

import pytest
from tokenizers import AddedToken, Tokenizer

from sftprep import build
from sftprep.errors import EmptyInput, TooManyRejected
from sftprep.report.summary import summary_lines
from sftprep.stream import open_stream
from tests.semantics.conftest import CHATML
from tests.semantics.prepared import prepare


def chat(*turns, **more):
    return {"messages": [{"role": role, "content": content} for role, content in turns], **more}


GOOD = chat(("user", "q"), ("assistant", "a"))
SUSPECTS = [
    (chat(("system", "s"), ("user", "q")), "no_target"),
    (chat(("assistant", "a"), ("user", "q")), "role_order"),
    (chat(("user", "q"), ("assistant", "a"), ("system", "s")), "role_order"),
    (chat(("user", "q"), ("assistant", "a"), ("assistant", "b")), "role_order"),
    (chat(("user", "q"), ("tool", "t"), ("assistant", "a")), "bad_tool"),
    (chat(("user", []), ("assistant", "a")), "empty_turn"),
    (chat(("user", [{"type": "text", "text": " \n"}]), ("assistant", "a")), "empty_turn"),
    (chat(("user", "q"), ("assistant", "")), "empty_target"),
    (chat(("user", "q"), ("assistant", "\t"), ("user", "r"), ("assistant", "b")), "empty_target"),
    ({"prompt": GOOD["messages"][:1], "completion": chat(("assistant", ""))["messages"]},
     "empty_target"),
    ({"conversations": [{"from": "human", "value": " "}, {"from": "gpt", "value": "a"}]},
     "empty_turn"),
    ({"instruction": "q", "output": " "}, "empty_target"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "reason"), SUSPECTS)
def test_suspects_are_counted_once_when_they_are_kept(folder_with, row, reason):
    made = prepare([row], folder_with(CHATML), train_on="all")
    warnings = {k: n for k, n in made.batch.counts.items() if k.startswith("warnings.")}
    assert warnings == {f"warnings.{reason}": 1}
    assert len(made) == 1


@pytest.mark.parametrize(("row", "reason"), SUSPECTS)
def test_suspects_are_rejected_for_the_reason_that_is_counted(folder_with, row, reason):
    made = prepare([row], folder_with(CHATML), train_on="all", on_bad_record="quarantine")
    (rejected,) = made.batch.rejected
    assert rejected.reason == reason
    assert made.batch.counts["warnings.suspects_rejected"] == 1
    assert f"warnings.{reason}" not in made.batch.counts


def test_the_message_about_a_result_names_the_message_before_it(folder_with):
    row = chat(("user", "q"), ("assistant", "a"), ("tool", "t"), ("user", "r"), ("tool", "u"))
    made = prepare([row], folder_with(CHATML), train_on="all", on_bad_record="quarantine")
    assert made.batch.rejected[0].message == (
        "message 5 is from a tool, but the message before it is not from the assistant or a tool"
    )


def test_the_message_names_what_an_empty_answer_has_besides_its_content(folder_with):
    row = chat(("user", "q"), ("assistant", ""))
    row["messages"][1]["reasoning_content"] = "why"
    made = prepare([row], folder_with(CHATML), quality_checks="reject")
    assert "is empty besides 'reasoning_content'" in made.batch.rejected[0].message


def test_the_summary_says_that_quarantine_rejects_suspects(records, tokenizer_dir, tmp_path):
    rows = [GOOD, GOOD, chat(("user", ""), ("assistant", "a"))]
    report = build(
        records(rows),
        tokenizer=tokenizer_dir,
        output=tmp_path / "o",
        on_bad_record="quarantine",
        max_rejected="50%",
    )
    text = "\n".join(summary_lines(report))
    assert "looks wrong, so it was rejected" in text
    assert "--quality-checks keep" in text
    assert report.manifest.accounting.warnings == {"suspects_rejected": 1}


def test_streams_count_suspects(records, tokenizer_dir):
    path = records([GOOD, *(row for row, _ in SUSPECTS[5:8])])
    stream = open_stream(path, tokenizer=str(tokenizer_dir))
    assert len([*stream]) > 0
    assert stream.counts["warnings.empty_turn"] == 2
    assert stream.counts["warnings.empty_target"] == 1


# --- media tags -----------------------------------------------------------------------------------

TAGS = "The <video> element, <audio> and <image>."


@pytest.mark.parametrize("text", [TAGS, "<video>\n  <source>\n</video>", "<image>"])
def test_media_tags_are_words_where_neither_tokenizer_nor_record_has_media(folder_with, text):
    rows = [chat(("user", "q"), ("assistant", text)), chat(("user", text), ("assistant", "a"))]
    made = prepare(rows, folder_with(CHATML), on_bad_record="quarantine")
    assert made.batch.rejected == []
    assert not any(name.startswith("warnings.") for name in made.batch.counts)


@pytest.mark.parametrize("is_special", [True, False])
def test_media_tags_count_where_the_tokenizer_has_such_a_token(folder_with, is_special):
    folder = folder_with(CHATML)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken("<video>", special=is_special)])
    tokenizer.save(str(folder / "tokenizer.json"))
    row = chat(("user", "q"), ("assistant", TAGS))
    kept = prepare([row], folder)
    assert kept.batch.counts["warnings.special_token_in_content"] == 1
    (rejected,) = prepare([row], folder, on_bad_record="quarantine").batch.rejected
    assert (rejected.reason, "'<video>'" in rejected.message) == ("special_tokens_in_text", True)
    only_audio = chat(("user", "q"), ("assistant", "The <audio> element."))
    assert prepare([only_audio], folder, on_bad_record="quarantine").batch.rejected == []


# --- characters outside the vocabulary ------------------------------------------------------------


def test_characters_that_become_the_unknown_token_are_counted(folder_with, tmp_path):
    from tokenizers import models, pre_tokenizers

    folder = folder_with(CHATML)
    words = ["<unk>", "<|im_start|>", "<|im_end|>", "user", "assistant", "sea", "wind"]
    tokenizer = Tokenizer(models.WordLevel({w: k for k, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(words[:3])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"unk_token": "<unk>", "pad_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    rows = [
        chat(("user", "sea"), ("assistant", "wind")),
        chat(("user", "sea"), ("assistant", "wave")),
        chat(("user", "<unk>"), ("assistant", "wind")),
        chat(("user", "<unk> fog"), ("assistant", "wind")),
    ]
    counts = prepare(rows, folder).batch.counts
    assert counts["warnings.unknown_characters"] == 2
    assert counts["warnings.special_token_in_content"] == 2


# --- when no record is left -----------------------------------------------------------------------


def test_the_first_record_of_each_reason_is_shown_when_none_is_left(
    records, tokenizer_dir, tmp_path
):
    empty = chat(("user", "q"), ("assistant", ""))
    rows = [chat(("Harbour", "q")), empty, chat(("Quay", "q")), chat(("user", 5))]
    path = records(rows)
    for limit, error in (("100%", EmptyInput), ("1", TooManyRejected)):
        settings = {"on_bad_record": "quarantine", "max_rejected": limit}
        with pytest.raises(error) as caught:
            build(path, tokenizer=tokenizer_dir, output=tmp_path / "o", **settings)
        message = caught.value.message
        assert f"{path}:1: message 1 of" in message
        assert "'Harbour'" in message
        assert f"{path}:2: message 2 is from the assistant and is empty" in message
        assert f"{path}:4: the content of message 1" in message
        assert "Quay" not in message
        assert 'quality_checks="keep"' in caught.value.remedy


def test_a_hold_out_does_not_hide_that_all_records_were_rejected(records, tokenizer_dir, tmp_path):
    path = records([chat(("Harbour", "q"))])
    with pytest.raises(EmptyInput, match=r"data\.jsonl:1: message 1"):
        build(
            path,
            tokenizer=tokenizer_dir,
            output=tmp_path / "o",
            on_bad_record="quarantine",
            max_rejected="100%",
            eval_fraction=0.5,
        )


@pytest.mark.parametrize(("limit", "error"), [("100%", EmptyInput), ("0", TooManyRejected)])
def test_a_stream_shows_the_first_record_of_each_reason(records, tokenizer_dir, limit, error):
    path = records([chat(("Harbour", "q"))])
    stream = open_stream(
        path, tokenizer=str(tokenizer_dir), on_bad_record="quarantine", max_rejected=limit
    )
    with pytest.raises(error, match=r"data\.jsonl:1: message 1 .*'Harbour'"):
        list(stream)


def test_each_kind_of_problem_of_a_record_is_counted(folder_with):
    rows = [
        chat(("user", ""), ("assistant", "")),
        chat(("user", "x"), ("assistant", "")),
        chat(("user", " "), ("assistant", "a"), ("assistant", "b"), ("user", "q"), ("tool", "t")),
        chat(("assistant", "a"), ("assistant", "b")),
    ]
    batch = prepare(rows, folder_with(CHATML)).batch
    found = {name: batch.counts.get(f"warnings.{name}", 0) for name in {r for _, r in SUSPECTS}}
    assert found == {
        "empty_turn": 2, "empty_target": 2, "role_order": 2, "bad_tool": 1, "no_target": 0,
    }  # fmt: skip
    first_lines = {name: batch.first_lines.get(f"warnings.{name}") for name in found}
    assert first_lines == {
        "empty_turn": 0, "empty_target": 0, "role_order": 2, "bad_tool": 2, "no_target": None,
    }  # fmt: skip
