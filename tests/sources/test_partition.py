"""Partitions contain every line exactly once and in order, however a file is cut."""

from __future__ import annotations

import gzip

import pytest
import zstandard
from hypothesis import assume, given
from hypothesis import strategies as st

from sftprep.errors import ConfigError, FormatError, InputNotFound, InputUnreadable
from sftprep.sources.partition import cut, find_files, open_input, read_partition
from sftprep.sources.readers import lines as lines_module
from sftprep.sources.readers.jsonl import split_lines

LINES = st.lists(st.binary(max_size=40).map(lambda b: b.replace(b"\n", b"")), max_size=30)


@given(
    lines=LINES,
    target=st.integers(1, 60),
    last_newline=st.booleans(),
    kind=st.sampled_from(["", ".gz", ".zst"]),
)
def test_partitions_contain_every_line_once_and_in_order(
    tmp_path_factory, lines, target, last_newline, kind
):
    content = b"\n".join(lines) + (b"\n" if last_newline else b"")
    # UTF-16 and the signatures of other kinds of files are rejected.
    assume(not content.startswith((b"\xff\xfe", b"\xfe\xff", *lines_module._SIGNATURES)))
    path = tmp_path_factory.mktemp("p") / f"a.jsonl{kind}"
    packed = {"": lambda b: b, ".gz": gzip.compress, ".zst": zstandard.compress}[kind](content)
    path.write_bytes(packed)
    parts = list(cut([str(path)], target))
    blocks = [read_partition(part) for part in parts]
    assert b"".join(blocks) == content
    assert [line for block in blocks for line in split_lines(block)] == split_lines(content)
    assert [part.index for part in parts] == list(range(len(parts)))
    assert all(
        block.endswith(b"\n")
        for block in blocks[:-1]
        if block and b"".join(blocks[blocks.index(block) + 1 :])
    )


def test_partitions_do_not_depend_on_other_inputs(tmp_path):
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    a.write_bytes(b"1\n22\n333\n" * 50)
    b.write_bytes(b"x\n" * 10)
    alone = [read_partition(p) for p in cut([str(a)], 64)]
    together = [read_partition(p) for p in cut([str(b), str(a)], 64) if p.input == 1]
    assert alone == together


@pytest.mark.parametrize("kind", ["", ".gz"])
def test_a_line_beyond_the_limit_is_cut_and_the_next_one_is_whole(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(lines_module, "LARGEST_LINE", 100)
    content = b"first\n" + b"x" * 1000 + b"\nlast\n"
    path = tmp_path / f"a.jsonl{kind}"
    path.write_bytes(gzip.compress(content) if kind else content)
    lines = [line for part in cut([str(path)], 64) for line in split_lines(read_partition(part))]
    assert lines[0] == b"first"
    assert lines[-1] == b"last"
    assert len(lines) == 3
    assert 100 < len(lines[1]) <= 1000


def test_files_are_found_by_folders_globs_and_paths(tmp_path):
    for name in ("b.jsonl", "a.jsonl.gz", "sub/c.jsonl.zst", ".hidden/d.jsonl", "note.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    found = [f.removeprefix(f"{tmp_path}/") for f in find_files((str(tmp_path),))]
    assert found == ["a.jsonl.gz", "b.jsonl", "sub/c.jsonl.zst"]
    assert find_files((f"{tmp_path}/*.jsonl",)) == [f"{tmp_path}/b.jsonl"]
    with pytest.raises(InputNotFound, match="does not exist"):
        find_files((f"{tmp_path}/none.jsonl",))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputNotFound, match="contains no"):
        find_files((f"{tmp_path}/empty",))
    with pytest.raises(FormatError, match="not a kind of file"):
        find_files((f"{tmp_path}/note.txt",))
    with pytest.raises(ConfigError, match="named twice"):
        find_files((f"{tmp_path}/b.jsonl", f"{tmp_path}/*.jsonl"))
    with pytest.raises(ConfigError, match="no input"):
        find_files(())


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress])
def test_a_compressed_file_that_is_cut_short_is_an_error(tmp_path, pack):
    suffix = ".gz" if pack is gzip.compress else ".zst"
    path = tmp_path / f"a.jsonl{suffix}"
    whole = pack(b'{"text": "a"}\n' * 10_000)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputUnreadable, match=r"a\.jsonl.*damaged or cut short"):
        list(cut([str(path)]))
    path.write_bytes(b"this is not compressed")
    with pytest.raises(InputUnreadable, match="damaged"):
        list(cut([str(path)]))


def test_utf16_is_an_error_that_names_the_encoding(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes('{"text": "a"}\n'.encode("utf-16"))
    with pytest.raises(InputUnreadable, match=r"UTF-16[\s\S]*iconv"):
        open_input(str(path))


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".jsonl.gz", ".jsonl.zst"])
@pytest.mark.parametrize(
    ("start", "kind"),
    [
        (b"\x1f\x8b", "gzip"),
        (b"\x28\xb5\x2f\xfd", "zstd"),
        (b"PAR1", "Parquet"),
        (b"ARROW1", "Arrow"),
        (b"PK\x03\x04", "zip"),
    ],
)
def test_a_file_of_another_kind_than_its_name_says_is_an_error(tmp_path, suffix, start, kind):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(start + b"\n\x00 and so on")
    right = suffix.endswith({"gzip": ".gz", "zstd": ".zst"}.get(kind, "no"))
    message = "damaged" if right else rf"{path.name} is .*{kind}.* its name does not say so\n  → \w"
    with pytest.raises(InputUnreadable, match=message):
        list(cut([str(path)]))
