"""A build from end to end: every record is in the shards once or is counted, and the bytes depend
on the input and the settings only."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from pyarrow import feather
from tokenizers import Tokenizer

from sftprep import BuildConfig, BuildReport, build, open_shards, read_manifest, verify
from sftprep.errors import (
    ConfigError,
    EmptyInput,
    FormatError,
    InputChanged,
    InputUnreadable,
    OutputBusy,
    OutputExists,
    RecordError,
    TemplateError,
    TokenizerError,
    TooManyRejected,
)
from sftprep.pipeline import build as build_module
from sftprep.pipeline.prepare import inputs as inputs_module
from sftprep.shards import manifest_size as manifest_module
from sftprep.shards.layout import mark_work_folder
from tests.conftest import EXAMPLES
from tests.support import rejected_file

CHATS = str(EXAMPLES / "data" / "chats.jsonl")
QA = str(EXAMPLES / "data" / "qa.jsonl")
TABLE = pa.table({"text": ["a b", "c d"]})
LINES = b'{"text": "a b"}\n' * 3
WRITERS = {
    "a.jsonl": lambda path: path.write_bytes(LINES),
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(LINES)),
    "a.json": lambda path: path.write_bytes(b'[{"text": "a b"}]'),
    "a.csv": lambda path: path.write_bytes(b"text\na b\n"),
    "a.parquet": lambda path: pq.write_table(TABLE, path),
    "a.feather": lambda path: feather.write_feather(TABLE, path),
}
"""A function that writes a file of each kind."""


def run(inputs, tokenizer, output, **settings):
    settings = {"max_length": 256, **settings}
    return build(
        BuildConfig.of(inputs=inputs, tokenizer=str(tokenizer), output=str(output), **settings)
    )


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def sequences(folder: Path) -> dict[int, tuple[list[int], list[bool]]]:
    """Return the ids and the mask of every sequence, by origin."""
    found: dict[int, tuple[list[int], list[bool]]] = {}
    for pack in open_shards(folder):
        at = 0
        for length, origin in zip(pack.seq_lengths.tolist(), pack.origin.tolist(), strict=True):
            assert origin not in found
            found[origin] = (
                pack.input_ids[at : at + length].tolist(),
                pack.completion_mask[at : at + length].tolist(),
            )
            at += length
    return found


def decoded(folder: Path, tokenizer_dir: Path) -> dict[int, tuple[str, str]]:
    """Return the text of every sequence and of its trained tokens, by origin."""
    tokenizer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    return {
        origin: (
            tokenizer.decode(ids, skip_special_tokens=False),
            tokenizer.decode(
                [i for i, m in zip(ids, mask, strict=True) if m], skip_special_tokens=False
            ),
        )
        for origin, (ids, mask) in sequences(folder).items()
    }


def test_text_ends_with_the_end_token_once(records, tokenizer_dir, tmp_path):
    path = records([{"text": "One two."}, {"text": "Three.<|im_end|>"}])
    run(path, tokenizer_dir, tmp_path / "o")
    texts = decoded(tmp_path / "o", tokenizer_dir)
    assert texts == {0: ("One two.<|im_end|>",) * 2, 1: ("Three.<|im_end|>",) * 2}


def test_only_the_completion_is_trained(records, tokenizer_dir, tmp_path):
    path = records(
        [{"prompt": "Q: 1+1?\nA:", "completion": " 2"}, {"prompt": "", "completion": "alone"}]
    )
    run(path, tokenizer_dir, tmp_path / "o")
    assert decoded(tmp_path / "o", tokenizer_dir) == {
        0: ("Q: 1+1?\nA: 2<|im_end|>", " 2<|im_end|>"),
        1: ("alone<|im_end|>", "alone<|im_end|>"),
    }
    run(path, tokenizer_dir, tmp_path / "all", train_on="all")
    assert decoded(tmp_path / "all", tokenizer_dir)[0] == ("Q: 1+1?\nA: 2<|im_end|>",) * 2


CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "Farewell."},
]


def test_conversations_are_rendered_with_the_template(records, tokenizer_dir, tmp_path):
    path = records([{"messages": CHAT}])
    whole = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in CHAT)
    run(path, tokenizer_dir, tmp_path / "all")
    assert decoded(tmp_path / "all", tokenizer_dir) == {0: (whole, whole)}
    run(path, tokenizer_dir, tmp_path / "assistant", train_on="assistant")
    assert decoded(tmp_path / "assistant", tokenizer_dir) == {
        0: (whole, "Hello.<|im_end|>Farewell.<|im_end|>")
    }


def test_a_conversational_completion_starts_after_the_generation_prompt(
    records, tokenizer_dir, tmp_path
):
    path = records([{"prompt": CHAT[:4], "completion": CHAT[4:]}])
    run(path, tokenizer_dir, tmp_path / "o")
    assert decoded(tmp_path / "o", tokenizer_dir)[0][1] == "Farewell.<|im_end|>\n"
    run(path, tokenizer_dir, tmp_path / "both", train_on="assistant")
    assert decoded(tmp_path / "both", tokenizer_dir)[0][1] == "Farewell.<|im_end|>"


def test_settings_replace_the_end_token_and_the_template(records, tokenizer_dir, tmp_path):
    template = tmp_path / "t.jinja"
    template.write_text(
        "{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}{{ eos_token }}{% endfor %}"
    )
    run(
        records([{"messages": CHAT[1:3]}]),
        tokenizer_dir,
        tmp_path / "a",
        chat_template=str(template),
    )
    assert (
        decoded(tmp_path / "a", tokenizer_dir)[0][0]
        == "[user] Hi<|im_end|>[assistant] Hello.<|im_end|>"
    )
    run(records([{"text": "a"}]), tokenizer_dir, tmp_path / "b", eos_token="<|endoftext|>")
    assert decoded(tmp_path / "b", tokenizer_dir)[0][0] == "a<|endoftext|>"


def test_a_long_sequence_keeps_its_start_and_the_rest_is_counted(records, tokenizer_dir, tmp_path):
    rows = [{"text": "word " * 100}, {"prompt": "p " * 100, "completion": "c"}]
    run(records(rows[:1]), tokenizer_dir, tmp_path / "whole", max_length=1000)
    whole = sequences(tmp_path / "whole")[0][0]
    report = run(records(rows[:1]), tokenizer_dir, tmp_path / "cut", max_length=16)
    assert sequences(tmp_path / "cut")[0][0] == whole[:16]
    accounts = report.manifest.accounting
    assert (accounts.truncated, accounts.tokens_truncated, accounts.tokens_in) == (
        1,
        len(whole) - 16,
        len(whole),
    )
    # A sequence whose completion is cut off completely is dropped and counted, with any packing.
    both = records([*rows[1:], {"prompt": "a", "completion": "b"}])
    for packing in ("bfd", "none"):
        accounts = run(
            both, tokenizer_dir, tmp_path / packing, max_length=16, packing=packing
        ).manifest.accounting
        assert accounts.dropped == {"no_trained_token": 1}
        assert accounts.tokens_dropped == {"no_trained_token": 16}
        assert accounts.sequences == 1


def test_the_seed_determines_the_order_of_the_packs(tokenizer_dir, tmp_path):
    one, two, three = (
        run(CHATS, tokenizer_dir, tmp_path / n, seed=s) for n, s in (("a", 1), ("b", 2), ("c", 1))
    )
    assert content(one.folder) == content(three.folder)
    assert one.manifest.digest != two.manifest.digest
    assert sequences(one.folder) == sequences(two.folder)


def test_every_row_is_one_sequence_without_packing(tokenizer_dir, tmp_path):
    packed, apart = (
        run(CHATS, tokenizer_dir, tmp_path / "p"),
        run(CHATS, tokenizer_dir, tmp_path / "n", packing="none"),
    )
    assert all(len(pack.seq_lengths) == 1 for pack in open_shards(apart.folder))
    assert sequences(packed.folder) == sequences(apart.folder)
    assert packed.manifest.rows < apart.manifest.rows


def test_position_ids_that_are_not_stored_are_derived(tokenizer_dir, tmp_path):
    stored, derived = (
        run(CHATS, tokenizer_dir, tmp_path / "s"),
        run(CHATS, tokenizer_dir, tmp_path / "d", position_ids=False),
    )
    assert derived.manifest.shards[0].bytes < stored.manifest.shards[0].bytes
    for a, b in zip(open_shards(stored.folder), open_shards(derived.folder), strict=True):
        assert np.array_equal(a.position_ids, b.position_ids)
        assert a.position_ids.dtype == b.position_ids.dtype == np.uint16


def test_the_bytes_do_not_depend_on_workers_or_compression(tokenizer_dir, tmp_path, monkeypatch):
    from sftprep.sources import groups

    plain = tmp_path / "in" / "a.jsonl"
    plain.parent.mkdir()
    data = Path(CHATS).read_bytes()
    plain.write_bytes(data)
    monkeypatch.setattr(groups, "PARTITION_BYTES", 20_000)
    settings = {"shard_tokens": 5_000, "train_on": "assistant"}
    one = run(str(plain), tokenizer_dir, tmp_path / "one", workers=1, **settings)
    two = run(str(plain), tokenizer_dir, tmp_path / "two", workers=2, **settings)
    assert len(one.manifest.shards) > 3
    assert content(one.folder) == content(two.folder)
    for suffix, pack in ((".gz", gzip.compress), (".zst", zstandard.compress)):
        packed = tmp_path / "in" / f"a.jsonl{suffix}"
        packed.write_bytes(pack(data))
        other = run(str(packed), tokenizer_dir, tmp_path / f"other{suffix}", workers=2, **settings)
        assert [s.sha256 for s in other.manifest.shards] == [s.sha256 for s in one.manifest.shards]


def test_every_sequence_is_traced_to_its_file_and_line(records, tokenizer_dir, tmp_path):
    first = records([{"text": f"first {k}"} for k in range(30)], "a.jsonl")
    path = tmp_path / "b.jsonl"
    path.write_text(
        "".join(f'{{"text": "second {k}"}}\n\n' for k in range(30))
        + '{"text": "no newline at the end"}'
    )
    report = run((first, str(path)), tokenizer_dir, tmp_path / "o")
    assert verify(report.folder).ok
    texts = decoded(report.folder, tokenizer_dir)
    assert len(texts) == 61
    for origin, (text, _) in texts.items():
        file, line = report.manifest.locate(origin)
        source = json.loads(Path(file).read_text().split("\n")[line - 1])
        assert text == source["text"] + "<|im_end|>"


def test_files_in_a_folder_may_have_different_formats(tokenizer_dir, tmp_path):
    report = run(
        str(EXAMPLES / "data"), tokenizer_dir, tmp_path / "o", train_on="assistant", max_length=2048
    )
    assert [i.format for i in report.manifest.inputs] == [
        "messages",
        "prompt-completion",
        "messages",
    ]
    assert report.manifest.accounting.records == report.manifest.accounting.sequences == 315
    assert verify(report.folder).ok
    assert sorted(os.listdir(report.folder)) == [
        "README.md",
        "groups",
        "manifest.json",
        "shards",
    ]


BAD = '{"text": "a"}\n\n{"text": 7}\n{"text": "b"}\n{oops\n'


def test_the_first_bad_record_stops_the_build_with_its_file_and_line(
    tokenizer_dir, tmp_path, monkeypatch
):
    path = tmp_path / "bad.jsonl"
    path.write_text(BAD)
    with pytest.raises(RecordError, match=rf"{path}:3: .*bad_type") as caught:
        run(str(path), tokenizer_dir, tmp_path / "o")
    assert caught.value.line == 3
    assert not (tmp_path / "o" / "manifest.json").exists()
    # With several workers, the error is still about the first bad line of the input.
    from sftprep.sources import groups

    monkeypatch.setattr(groups, "PARTITION_BYTES", 10)
    with pytest.raises(RecordError) as again:
        run(str(path), tokenizer_dir, tmp_path / "o2", workers=2)
    assert str(again.value) == str(caught.value)


def test_bad_records_are_quarantined_up_to_a_limit(tokenizer_dir, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text(BAD)
    with pytest.raises(TooManyRejected, match="2 of 4 records"):
        run(str(path), tokenizer_dir, tmp_path / "o", on_bad_record="quarantine")
    report = run(
        str(path), tokenizer_dir, tmp_path / "o", on_bad_record="quarantine", max_rejected="50%"
    )
    rejected = [json.loads(line) for line in rejected_file(tmp_path / "o").read_text().splitlines()]
    assert [(r["file"], r["line"], r["reason"]) for r in rejected] == [
        (str(path), 3, "bad_type"),
        (str(path), 5, "bad_json"),
    ]
    accounts = report.manifest.accounting
    assert accounts.rejected == {"bad_json": 1, "bad_type": 1}
    assert (accounts.lines, accounts.blank, accounts.records, accounts.sequences) == (5, 1, 4, 2)
    assert sorted(sequences(report.folder)) == [0, 3]


def test_a_conversation_that_the_template_raises_on_is_a_bad_record(
    records, tokenizer_dir, tmp_path
):
    template = tmp_path / "t.jinja"
    template.write_text(
        "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}{{"
        " messages[0].content }}"
    )
    path = records([{"messages": CHAT[1:]}, {"messages": CHAT}])
    with pytest.raises(RecordError, match=r"(?s):2: .*user first.*template_error.*chat_template"):
        run(path, tokenizer_dir, tmp_path / "o", chat_template=str(template))


def test_unsupported_settings_are_rejected_before_the_output_folder_is_created(
    records, tokenizer_dir, tmp_path
):
    text, chat = records([{"text": "a"}], "t.jsonl"), records([{"messages": CHAT}], "c.jsonl")
    other = records([{"Query": "a", "Reply": "b"}], "q.jsonl")
    unmarked = tmp_path / "unmarked.jinja"
    unmarked.write_text("{% for m in messages %}{{ m.content | upper }}{% endfor %}")
    broken = tmp_path / "broken.jinja"
    broken.write_text("{% for %}")
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "tokenizer.json").write_bytes((tokenizer_dir / "tokenizer.json").read_bytes())
    (bare / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    cases = [
        (ConfigError, "no completion", chat, tokenizer_dir, {"train_on": "completion"}),
        (ConfigError, "have no turns", text, tokenizer_dir, {"train_on": "assistant"}),
        (
            TemplateError,
            "mark",
            chat,
            tokenizer_dir,
            {"train_on": "assistant", "chat_template": str(unmarked)},
        ),
        (
            TemplateError,
            "line 1 of the chat template",
            chat,
            tokenizer_dir,
            {"chat_template": str(broken)},
        ),
        (
            TemplateError,
            "cannot read",
            chat,
            tokenizer_dir,
            {"chat_template": str(tmp_path / "none")},
        ),
        (TemplateError, "no chat template", chat, bare, {}),
        (TokenizerError, "no end-of-sequence token", text, bare, {}),
        (TokenizerError, "nope", text, tokenizer_dir, {"eos_token": "<|nope|>"}),
        (TokenizerError, "nowhere", text, tmp_path / "nowhere", {}),
        (FormatError, r"'Query', 'Reply'", other, tokenizer_dir, {}),
    ]
    for kind, message, path, tokenizer, settings in cases:
        with pytest.raises(kind, match=message) as caught:
            run(path, tokenizer, tmp_path / "o", **settings)
        assert caught.value.remedy
        assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("text", ["", "\n\n", '{"text": ""}\n'])
def test_an_input_without_usable_records_is_an_error(tokenizer_dir, tmp_path, text):
    path = tmp_path / "e.jsonl"
    path.write_text(text)
    with pytest.raises(EmptyInput, match="no usable record"):
        run(str(path), tokenizer_dir, tmp_path / "o")
    assert not (tmp_path / "o" / "manifest.json").exists()


def test_a_finished_build_is_replaced_only_with_overwrite(records, tokenizer_dir, tmp_path):
    first = run(records([{"text": "a b c"}], "a.jsonl"), tokenizer_dir, tmp_path / "o").manifest
    other = records([{"text": "d e f g"}], "b.jsonl")
    with pytest.raises(OutputExists, match="finished build"):
        run(other, tokenizer_dir, tmp_path / "o")
    assert read_manifest(tmp_path / "o").digest == first.digest
    second = run(other, tokenizer_dir, tmp_path / "o", overwrite=True).manifest
    assert second.digest != first.digest
    shards = tmp_path / "o" / "shards"
    assert {p.relative_to(shards).as_posix() for p in shards.rglob("*.arrow")} == {
        s.name for s in second.shards
    }


def test_a_folder_with_user_files_is_not_changed(records, tokenizer_dir, tmp_path):
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "thesis.txt").write_text("mine")
    with pytest.raises(OutputExists, match=r"thesis\.txt"):
        run(records([{"text": "a b"}]), tokenizer_dir, tmp_path / "o")
    assert os.listdir(tmp_path / "o") == ["thesis.txt"]


def test_two_builds_do_not_share_a_folder(records, tokenizer_dir, tmp_path):
    import fcntl

    (tmp_path / "o" / "spill").mkdir(parents=True)
    mark_work_folder(tmp_path / "o", created=True)
    with open(tmp_path / "o" / "spill" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(OutputBusy, match="another build"):
            run(records([{"text": "a b"}]), tokenizer_dir, tmp_path / "o")


def test_an_input_that_changes_during_the_build_is_detected(records, tokenizer_dir, tmp_path):
    path = records([{"text": "a b"}] * 50)

    def meddle(stage, done, total):
        with open(path, "a") as file:
            file.write('{"text": "late"}\n')

    config = BuildConfig.of(
        inputs=path, tokenizer=str(tokenizer_dir), output=str(tmp_path / "o"), max_length=64
    )
    with pytest.raises(InputChanged, match=path):
        build(config, progress=meddle)
    assert not (tmp_path / "o" / "manifest.json").exists()


@pytest.mark.parametrize("instead", ["nothing", "folder", "pipe", "link"])
def test_an_input_that_is_removed_or_replaced_during_the_build_is_detected(
    records, tokenizer_dir, tmp_path, instead
):
    path = Path(records([{"text": "a b"}] * 50))

    def meddle(stage, done, total):
        path.unlink(missing_ok=True)
        if instead == "folder":
            path.mkdir()
        elif instead == "pipe":
            os.mkfifo(path)
        elif instead == "link":
            path.symlink_to("nowhere")

    config = BuildConfig.of(
        inputs=str(path), tokenizer=str(tokenizer_dir), output=str(tmp_path / "o"), max_length=64
    )
    stages = []
    with pytest.raises(InputChanged, match=str(path)) as caught:
        build(config, progress=lambda *now: stages or (meddle(*now), stages.append(now)))
    assert caught.value.remedy
    assert not (tmp_path / "o" / "manifest.json").exists()


@pytest.mark.parametrize("by", ["rename", "write"])
def test_a_replaced_input_of_equal_size_and_time_is_detected(records, tokenizer_dir, tmp_path, by):
    path = Path(records([{"text": "a b"}] * 50))
    before = path.stat()
    stages = []

    def replace(*now):
        if stages:
            return
        stages.append(now)
        target = path if by == "write" else tmp_path / "new.jsonl"
        target.write_bytes(path.read_bytes().replace(b"a b", b"c d"))
        os.utime(target, ns=(before.st_atime_ns, before.st_mtime_ns))
        target.rename(path)

    config = BuildConfig.of(
        inputs=str(path), tokenizer=str(tokenizer_dir), output=str(tmp_path / "o"), max_length=64
    )
    with pytest.raises(InputChanged, match=str(path)):
        build(config, progress=replace)


@pytest.mark.parametrize("moment", ["listed", "prepared"])
@pytest.mark.parametrize("name", list(WRITERS))
def test_the_error_names_an_input_that_is_removed_before_it_is_read(
    tokenizer_dir, tmp_path, monkeypatch, name, moment
):
    path = tmp_path / name
    module, listing = (
        (inputs_module, "files_of_input") if moment == "listed" else (build_module, "prepare_setup")
    )
    found_by = getattr(module, listing)

    def remove_after(*arguments, **settings):
        found = found_by(*arguments, **settings)
        path.unlink()
        return found

    monkeypatch.setattr(module, listing, remove_after)
    for window in (None, 16):
        WRITERS[name](path)
        with pytest.raises(InputUnreadable, match=f"cannot read {path}"):
            run(str(path), tokenizer_dir, tmp_path / "o", pack_window=window)


@pytest.mark.parametrize(
    ("setting", "remedy"),
    [
        ("chat_template", "chat_template"),
        ("text_field", "text_field"),
        ("map", "map"),
        ("sources", "sources"),
    ],
)
def test_a_setting_too_large_for_a_manifest_is_rejected_before_anything_is_written(
    records, tokenizer_dir, tmp_path, setting, remedy
):
    rows, large = records([{"text": "a b"}] * 5), "x" * (65 << 20)
    values = {"text_field": large, "map": f"{large}=text"}
    if setting == "chat_template":
        template = tmp_path / "large.jinja"
        template.write_text(
            "{#" + large + "#}" + (tokenizer_dir / "chat_template.jinja").read_text()
        )
        values[setting] = str(template)
    elif setting == "sources":
        values[setting] = ({"path": rows, "name": large},)
    given = {"inputs": rows} if setting != "sources" else {}
    config = BuildConfig.of(
        **given,
        tokenizer=str(tokenizer_dir),
        output=str(tmp_path / "o"),
        **{setting: values[setting]},
    )
    with pytest.raises(ConfigError, match="64 MiB at most can be read") as caught:
        build(config)
    assert remedy in caught.value.remedy
    assert len(str(caught.value)) < 500
    assert not (tmp_path / "o").exists()


def test_a_group_whose_file_would_be_too_large_is_found_before_the_shards_are_written(
    tokenizer_dir, tmp_path, monkeypatch
):
    (tmp_path / "in").mkdir()
    for number in range(300):
        (tmp_path / "in" / f"{number}.jsonl").write_text('{"text": "a b"}\n{"text": 1}\n[\n')
    config = BuildConfig.of(
        inputs=str(tmp_path / "in"),
        tokenizer=str(tokenizer_dir),
        output=str(tmp_path / "o"),
        on_bad_record="quarantine",
        max_rejected="100%",
    )
    monkeypatch.setattr(manifest_module, "LARGEST_MANIFEST", 200_000)
    stages = set()
    with pytest.raises(ConfigError, match="the entries of the inputs") as caught:
        build(config, progress=lambda stage, *_: stages.add(stage))
    assert caught.value.remedy == "lower group_bytes"
    assert stages == {"tokenize"}


def test_complete_spills_are_reused_and_damaged_ones_are_not(tokenizer_dir, tmp_path):
    def run_again(max_length: int) -> BuildReport:
        settings = {"keep_spill": True, "overwrite": True, "max_length": max_length}
        return run(CHATS, tokenizer_dir, tmp_path / "o", **settings)

    # A build with the same settings would need no spill at all.
    first, again = run_again(256), run_again(128)
    assert (first.reused, again.reused) == (0, 1)
    before = content(first.folder)
    (spill,) = (tmp_path / "o" / "spill").glob("*.arrow")
    spill.write_bytes(spill.read_bytes()[:-1000] + b"\0" * 1000)
    torn = run_again(64)
    assert torn.reused == 0
    assert run_again(128).manifest.digest == again.manifest.digest
    assert content(first.folder) == before
