"""`sftprep preview` and `sftprep doctor`: what they show is what a build stores."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

import sftprep
from sftprep import build, doctor, open_shards, preview
from sftprep.cli import main
from sftprep.errors import ConfigError
from sftprep.previews.sample import sample_records
from sftprep.report.token_text import wrap_parts
from sftprep.sources.partition import source_of
from tests.conftest import EXAMPLES

DATA = EXAMPLES / "data"


def turn(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


CHAT = {
    "messages": [
        turn("system", "Be brief."),
        turn("user", "Hé\n中文?"),
        turn("assistant", "Yés 🙂"),
    ]
}
PROMPT_ONLY = {"messages": [turn("user", "Hi")]}


def stored(folder: Path) -> dict[tuple[str, int], list[tuple[list[int], list[bool], Any]]]:
    """Return the sequences of a build, sorted, by the file and the line of their record."""
    found: dict[tuple[str, int], list[Any]] = {}
    shards = open_shards(folder)
    for number, pack in enumerate(shards):
        ends = np.cumsum(pack.seq_lengths)
        for sequence, end in enumerate(ends.tolist()):
            part = slice(end - int(pack.seq_lengths[sequence]), end)
            weights = (
                pack.completion_mask[part] if pack.loss_weights is None else pack.loss_weights[part]
            )
            found.setdefault(shards.locate(number, sequence), []).append(
                (
                    pack.input_ids[part].tolist(),
                    pack.completion_mask[part].tolist(),
                    weights.astype(float).tolist(),
                )
            )
    return {place: sorted(sequences, key=str) for place, sequences in found.items()}


def shown(result: Any) -> dict[tuple[str, int], list[Any]]:
    """Return the sequences of a preview that a build contains, in the same form."""
    found = {}
    for record in result.records:
        kept = [each for each in record.sequences if not each.dropped]
        if kept:
            found[record.file, record.line] = sorted(
                (
                    (
                        each.input_ids.tolist(),
                        each.completion_mask.tolist(),
                        weights_of(each),
                    )
                    for each in kept
                ),
                key=str,
            )
    return found


def weights_of(sequence: Any) -> list[float]:
    weights = sequence.loss_weights
    mask: np.ndarray[Any, Any] = sequence.completion_mask
    return (mask if weights is None else weights).astype(float).tolist()


@pytest.mark.parametrize(
    ("file", "settings"),
    [
        ("chats.jsonl", {"train_on": "assistant", "max_length": 64}),
        ("chats.jsonl", {"train_on": "last-assistant", "max_length": 48, "overlong": "split"}),
        ("chats.jsonl", {"max_length": 64, "truncate_side": "left", "train_on": "assistant"}),
        ("qa.jsonl", {"max_length": 256}),
        ("qa.jsonl", {"as_chat": True, "max_length": 128, "overlong": "drop"}),
        ("tools.jsonl", {"reasoning": "expand", "max_length": 2048}),
    ],
)
def test_the_tokens_are_those_of_a_build(
    file: str, settings: dict[str, Any], tokenizer_dir: Path, tmp_path: Path
) -> None:
    path = str(DATA / file)
    result = preview(path, tokenizer=tokenizer_dir, number=12, **settings)
    folder = tmp_path / "o"
    build(path, tokenizer=tokenizer_dir, output=folder, limit=12, **settings)
    assert shown(result) == stored(folder)


def test_weights_escapes_and_transforms_are_those_of_a_build(
    tokenizer_dir: Path, tmp_path: Path
) -> None:
    rows = [
        {"messages": [turn("user", "a"), turn("assistant", "b", weight=0.5)]},
        {"messages": [turn("user", "say <|im_end|> now"), turn("assistant", "no")]},
        {"messages": [turn("user", "c"), turn("assistant", "d")]},
    ]
    settings = {"tokenizer": tokenizer_dir, "escape_special": True, "transform": twice}
    result = preview(rows, max_length=256, **settings)
    build(rows, max_length=256, output=tmp_path / "o", **settings)
    assert shown(result) == stored(tmp_path / "o")
    assert [len(record.sequences) for record in result.records] == [2, 2, 2]
    (escaped,) = {"".join(each.pieces) for each in result.records[1].sequences}
    assert "say <|im_end|> now" in escaped
    assert "assistant" in result.records[1].sequences[0].roles


def twice(record: dict[str, Any]) -> list[dict[str, Any]]:
    return [record, record]


def test_pieces_join_to_the_text_and_roles_are_those_of_the_messages(tokenizer_dir: Path) -> None:
    (record,) = preview([CHAT], tokenizer=tokenizer_dir, train_on="assistant").records
    (sequence,) = record.sequences
    text_of: dict[str, str] = {}
    for piece, role in zip(sequence.pieces, sequence.roles, strict=True):
        text_of[role] = text_of.get(role, "") + piece
    assert [*text_of] == ["system", "user", "assistant"]
    assert text_of["user"] == "<|im_start|>user\nHé\n中文?<|im_end|>\n"
    trained = [p for p, mask in zip(sequence.pieces, sequence.completion_mask, strict=True) if mask]
    assert "".join(trained).startswith("Yés 🙂<|im_end|>")


def test_rows_of_tokens_are_shown_as_text(tokenizer_dir: Path) -> None:
    (source,) = preview([{"text": "Hé 中文 🙂"}], tokenizer=tokenizer_dir).records[0].sequences
    row = {"input_ids": source.input_ids.tolist()}
    (sequence,) = preview([row], tokenizer=tokenizer_dir).records[0].sequences
    assert sequence.pieces == source.pieces
    assert "".join(sequence.pieces) == "Hé 中文 🙂<|im_end|>"


def test_a_preview_takes_the_records_of_a_mixture_in_turn(
    records: Any, tokenizer_dir: Path
) -> None:
    paths = [records([{"text": f"{name} {n}"} for n in range(9)], f"{name}.jsonl") for name in "ab"]
    sources = [{"path": paths[0], "weight": 3, "name": "first"}, {"path": paths[1], "weight": 1}]
    result = preview(tokenizer=tokenizer_dir, sources=sources, number=5)
    places = [(Path(each.file).name, each.line) for each in result.records]
    assert places == [
        ("a.jsonl", 1),
        ("a.jsonl", 2),
        ("a.jsonl", 3),
        ("b.jsonl", 1),
        ("b.jsonl", 2),
    ]
    assert [(each.name, each.weight) for each in result.sources] == [
        ("first", 3.0),
        (paths[1], 1.0),
    ]


def test_lines_and_random_records_are_found(records: Any, tokenizer_dir: Path) -> None:
    path = records([{"text": f"number {n}"} for n in range(50)])
    result = preview(path, tokenizer=tokenizer_dir, line=[7, 3])
    assert ["".join(r.sequences[0].pieces)[:8] for r in result.records] == ["number 6", "number 2"]
    chosen = [preview(path, tokenizer=tokenizer_dir, random=s).records for s in (1, 1, 2)]
    lines = [[record.line for record in each] for each in chosen]
    assert lines[0] == lines[1] != lines[2]
    for record in chosen[0]:
        assert "".join(record.sequences[0].pieces).startswith(f"number {record.line - 1}<")
    assert len(preview(path, tokenizer=tokenizer_dir, line=("data.jsonl", 9)).records) == 1
    with pytest.raises(ConfigError, match="is 'x'"):
        preview(path, tokenizer=tokenizer_dir, line="x")
    with pytest.raises(ConfigError, match="no record in line 51"):
        preview(path, tokenizer=tokenizer_dir, line=51)
    with pytest.raises(ConfigError, match="names none of the inputs"):
        preview(path, tokenizer=tokenizer_dir, line=("other.jsonl", 1))


def test_bad_records_are_shown_with_their_reason(tmp_path: Path, tokenizer_dir: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{json.dumps(CHAT)}\n\n{{"messages": [}}\n{json.dumps(CHAT)}\n')
    result = preview(path, tokenizer=tokenizer_dir)
    assert [(record.line, len(record.sequences)) for record in result.records] == [
        (1, 1),
        (3, 0),
        (4, 1),
    ]
    (rejected,) = result.records[1].rejected
    assert rejected.reason == "bad_json"
    # A build would stop here; with a quarantine, it would not.
    assert [(v.kind, v.severity, v.line) for v in result.verdicts] == [
        ("rejected.bad_json", "major", 3)
    ]
    quarantined = preview(
        path, tokenizer=tokenizer_dir, on_bad_record="quarantine", max_rejected="50%"
    )
    assert [verdict.severity for verdict in quarantined.verdicts] == ["minor"]


# --- doctor ---------------------------------------------------------------------------------------


def found(result: Any) -> dict[str, tuple[str, int, int]]:
    return {v.kind: (v.severity, v.number, v.line) for v in result.verdicts}


def test_records_without_an_answer_are_minor_and_lost_answers_major(tokenizer_dir: Path) -> None:
    long = {"messages": [turn("user", "x " * 400), turn("assistant", "b")]}
    rows = [CHAT, PROMPT_ONLY, CHAT, long, PROMPT_ONLY]
    result = doctor(rows, tokenizer=tokenizer_dir, train_on="assistant", max_length=64)
    assert not result.ok
    assert found(result) == {
        "no_trained_token": ("major", 1, 4),
        "no_target": ("minor", 2, 2),
        "truncated": ("minor", 1, 4),
    }
    assert doctor(rows[:3], tokenizer=tokenizer_dir, train_on="assistant").ok


def test_two_tokens_at_the_beginning_are_major(folder_with: Any) -> None:
    folder = folder_with("{{ bos_token }}{{ bos_token }}{{ messages[0].content }}<|im_end|>")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["bos_token"] = "<|im_start|>"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    result = doctor([PROMPT_ONLY], tokenizer=folder, quality_checks="keep")
    assert found(result)["double_bos"] == ("major", 1, 1)


def test_lost_messages_and_missing_ends_are_major(folder_with: Any, tokenizer_dir: Path) -> None:
    template = (
        "{% for m in messages %}{% if m.role != 'system' %}<|im_start|>{{ m.role }}\n"
        "{% generation %}{{ m.content }}{% endgeneration %}{% endif %}{% endfor %}"
    )
    result = doctor([CHAT], tokenizer=folder_with(template), train_on="assistant")
    assert found(result) == {
        "message_not_shown": ("major", 1, 1),
        "end_of_turn_not_trained": ("major", 1, 1),
    }


def test_every_verdict_about_a_warning_is_one_of_the_build(
    tokenizer_dir: Path, tmp_path: Path
) -> None:
    rows = [
        CHAT,
        {"messages": [turn("user", ""), turn("assistant", "a <|im_end|> b")]},
        {"messages": [turn("user", "q"), turn("assistant", "<think>x</think>a", thinking="t")]},
    ]
    report = build(rows, tokenizer=tokenizer_dir, output=tmp_path / "o", max_length=256)
    result = doctor(rows, tokenizer=tokenizer_dir, max_length=256)
    assert result.ledger.warnings == report.manifest.accounting.warnings
    assert {kind: number for kind, (_, number, _) in found(result).items()} == (
        report.manifest.accounting.warnings
    )
    assert result.examined_all


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet", "json"])
def test_a_sample_is_spread_evenly_and_located(kind: str, tmp_path: Path) -> None:
    count = 20_000
    rows = [{"text": f"number {n} " + "x" * 60} for n in range(count)]
    path = tmp_path / f"a.{kind}"
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=1000)
    elif kind == "json":
        path.write_text(json.dumps(rows))
    else:
        path.write_bytes(gzip.compress(lines, 1) if kind.endswith("gz") else lines)
    sources = [source_of(str(path))]
    sample, is_complete = sample_records(sources, 100)
    assert not is_complete
    assert sample == sample_records(sources, 100)[0]
    numbers = [int(json.loads(record.data)["text"].split()[1]) for record in sample]
    assert [record.line(sources) - 1 for record in sample] == numbers == sorted(numbers)
    assert 80 <= len(numbers) <= 100
    # No tenth of the input has much more or less than a tenth of the sample.
    per_tenth = np.bincount(np.array(numbers) * 10 // count, minlength=10)
    assert per_tenth.min() >= 5
    assert per_tenth.max() <= 20
    assert len(sample_records(sources, count)[0]) == count
    assert sample_records(sources, count)[1]


# --- the commands ---------------------------------------------------------------------------------


def run(capsys: Any, *words: str) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main([*words])
    output = capsys.readouterr()
    return int(stopped.value.code or 0), output.out, output.err


def test_preview_prints_plain_text_and_escapes_controls(
    records: Any, tokenizer_dir: Path, capsys: Any
) -> None:
    chat = {"messages": [turn("user", "a\x1b[31m\tb"), turn("assistant", "c\nd")]}
    flags = [records([chat]), "--tokenizer", str(tokenizer_dir), "--train-on", "assistant"]
    code, text, _ = run(capsys, "preview", *flags, "--no-tokens")
    assert code == 0
    assert "\x1b" not in text
    assert "  user        <|im_start|>user↵\n              a\\u001b[31m\\tb<|im_end|>↵\n" in text
    assert (
        "  assistant   <|im_start|>assistant↵\n              ⟦c↵⟧\n              ⟦d<|im_end|>⟧"
        in text
    )
    assert "format messages" in text
    assert "·" in run(capsys, "preview", *flags)[1]
    colored = run(capsys, "preview", *flags, "--color")[1]
    assert "\x1b[32m" in colored
    assert "\x1b[31m" not in colored
    assert "⟦" not in colored


def test_preview_folds_only_long_texts(records: Any, tokenizer_dir: Path, capsys: Any) -> None:
    lines = "\n".join(f"line {n}" for n in range(100))
    chat = {
        "messages": [turn("system", lines), turn("user", lines), turn("assistant", "all of it")]
    }
    flags = [records([chat]), "--tokenizer", str(tokenizer_dir), "--train-on", "assistant"]
    flags += ["--max-length", "8k"]
    text = run(capsys, "preview", *flags, "--no-tokens")[1]
    assert "lines omitted (--full shows them)" in text
    assert "line 50" not in text
    assert text.count("  user        <|im_start|>user↵") == 1  # each turn is folded by itself
    assert "all of it" in text
    assert "line 50" in run(capsys, "preview", *flags, "--no-tokens", "--full")[1]


def test_the_commands_take_the_flags_and_the_file_of_a_build(
    records: Any, tokenizer_dir: Path, tmp_path: Path, capsys: Any
) -> None:
    config = tmp_path / "c.yaml"
    output = tmp_path / "o"
    config.write_text(
        f"inputs: [{records([CHAT, PROMPT_ONLY])}]\ntokenizer: {tokenizer_dir}\npacking: exact\n"
        f"output: {output}\nworkers: 2\ntrain_on: assistant\n"
    )
    code, text, _ = run(capsys, "preview", "--config", str(config), "-n", "1", "--json")
    data = json.loads(text)
    assert (code, len(data["records"]), data["ok"]) == (0, 1, True)
    (sequence,) = data["records"][0]["sequences"]
    assert len(sequence["input_ids"]) == len(sequence["pieces"]) == len(sequence["roles"])
    code, text, _ = run(capsys, "doctor", "--config", str(config), "--json")
    assert (code, [each["kind"] for each in json.loads(text)["verdicts"]]) == (0, ["no_target"])
    assert not output.exists()


def test_aliases_of_flags_are_accepted_and_all_that_is_missing_is_named(
    records: Any, tokenizer_dir: Path, capsys: Any
) -> None:
    flags = ["--tokenizer", str(tokenizer_dir), "--assistant_only_loss", "--max_seq_length", "1k"]
    data = json.loads(run(capsys, "preview", records([CHAT]), *flags, "--json")[1])
    assert (data["max_length"], data["sources"][0]["trained"]) == (
        1024,
        "the turns of the assistant",
    )
    code, _, error = run(capsys, "doctor")
    assert code == 2
    assert "no input and no tokenizer are specified" in error


def test_doctor_fails_with_remedies_as_flags(
    records: Any, tokenizer_dir: Path, capsys: Any
) -> None:
    long = {"messages": [turn("user", "x " * 400), turn("assistant", "b")]}
    path = records([CHAT, long])
    flags = ["--tokenizer", str(tokenizer_dir), "--train-on", "assistant", "--max-length", "64"]
    code, text, _ = run(capsys, "doctor", path, *flags)
    assert code == 1
    assert (
        f"MAJOR no token of it is trained, so a build leaves it out (1 sequence, first in {path}:2)"
        in text
    )
    assert "→ raise --max-length if its answer is cut" in text
    assert text.endswith("1 major and 1 minor finding in all 2 records\n")


@pytest.mark.parametrize(
    "flags", [["--line", "x"], ["--line", "0"], ["-n", "0"], ["--no-such-flag"], ["--line", "99"]]
)
def test_wrong_flags_are_usage_errors(
    flags: list[str], records: Any, tokenizer_dir: Path, capsys: Any
) -> None:
    code, _, error = run(
        capsys, "preview", records([CHAT]), "--tokenizer", str(tokenizer_dir), *flags
    )
    assert code == 2
    assert error.startswith("error: ")


def test_env_names_the_encoder_and_the_caches(tokenizer_dir: Path, capsys: Any) -> None:
    sftprep.load_tokenizer(str(tokenizer_dir))
    code, text, _ = run(capsys, "env", "--tokenizer", str(tokenizer_dir), "--json")
    data = json.loads(text)
    assert code == 0
    assert data["encoder"]["encoder"] in ("gigatoken", "tokenizers")
    assert data["packages"]["numpy"] == np.__version__
    assert data["cores"] >= 1
    assert any(cache["name"] == "tokenizers" and cache["bytes"] for cache in data["caches"])
    text = run(capsys, "env")[1]
    assert "name a tokenizer to see which one it gets" in text


@given(
    st.lists(st.tuples(st.booleans(), st.text("ab 中\x1f", max_size=40)), max_size=5),
    st.integers(2, 30),
)
def test_wrapped_lines_fit_and_lose_nothing(parts: list[tuple[bool, str]], width: int) -> None:
    lines = wrap_parts(parts, width)
    for line in lines:
        assert sum(cell_len(text.replace("\x1f", "·")) for _, text in line) <= width
    characters = [(trained, c) for line in lines for trained, text in line for c in text]
    assert characters == [(trained, c) for trained, text in parts for c in text]
