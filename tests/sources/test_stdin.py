"""Records from a pipe: `sftprep build -`."""

from __future__ import annotations

import gzip
import io
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

import sftprep
from sftprep.cli.entry import main
from sftprep.errors import ConfigError, InputUnreadable
from sftprep.sources import stdin
from sftprep.sources.stdin import read_blocks
from tests.conftest import EXAMPLES

CHATS = (EXAMPLES / "data" / "chats.jsonl").read_bytes().splitlines(keepends=True)[:20]
RECORDS = b"".join(CHATS)
Run = Callable[..., tuple[int, str, str]]


def to_zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command with bytes in a real pipe as its stdin."""

    def run_command(data: bytes, *arguments: str) -> tuple[int, str, str]:
        reader, writer = os.pipe()

        def write() -> None:
            with open(writer, "wb", buffering=0) as file:
                for start in range(0, len(data), 1000):
                    file.write(data[start : start + 1000])

        thread = threading.Thread(target=write, daemon=True)
        thread.start()
        with open(reader, encoding="utf-8") as stream:
            monkeypatch.setattr("sys.stdin", stream)
            with pytest.raises(SystemExit) as end:
                main([*arguments])
            stream.buffer.read()  # so that the writer ends, whatever the command read
        thread.join()
        return int(end.value.code or 0), *capsys.readouterr()

    return run_command


@pytest.mark.parametrize("pack", [bytes, gzip.compress, to_zstd], ids=["plain", "gzip", "zstd"])
def test_a_build_of_stdin_has_the_packs_of_a_file(
    pack: Callable[[bytes], bytes], run: Run, tokenizer_dir: Path, tmp_path: Path
) -> None:
    flags = ("--tokenizer", str(tokenizer_dir), "--workers", "1", "--train-on", "assistant")
    code, _, error = run(pack(RECORDS), "build", "-", "-o", str(tmp_path / "a"), *flags)
    assert (code, error) == (0, "")
    (tmp_path / "chats.jsonl").write_bytes(RECORDS)
    file = str(tmp_path / "chats.jsonl")
    assert run(b"", "build", file, "-o", str(tmp_path / "b"), *flags)[0] == 0
    found, expected = (sftprep.read_manifest(tmp_path / name) for name in "ab")
    assert found.data_digest == expected.data_digest
    assert [info.path for info in found.inputs] == ["<stdin>"]
    assert found.config["inputs"] == ["<stdin>"]
    assert sftprep.verify(tmp_path / "a").ok


def test_several_rounds_and_the_hold_out_read_stdin_once(
    run: Run, tokenizer_dir: Path, tmp_path: Path
) -> None:
    flags = ("--tokenizer", str(tokenizer_dir), "--duplicates", "drop", "--eval-fraction", "0.3")
    output = tmp_path / "out"
    code, shown, _ = run(RECORDS * 2, "build", "-o", str(output), *flags, "-")
    assert code == 0, shown
    ledger = sftprep.read_manifest(output).accounting
    assert ledger.records == 40
    assert ledger.left_out["duplicate"] == 20
    assert ledger.left_out["held_out"] > 0


def test_preview_and_doctor_read_it(run: Run, tokenizer_dir: Path) -> None:
    flags = ("--tokenizer", str(tokenizer_dir))
    code, shown, _ = run(RECORDS, "preview", "-", "-n", "1", *flags)
    assert code == 0
    assert "<stdin>:1" in shown
    code, shown, _ = run(RECORDS, "preview", "-", "--line", "7", *flags, "--json")
    assert json.loads(shown)["records"][0]["line"] == 7
    code, shown, _ = run(gzip.compress(RECORDS), "doctor", "-", *flags)
    assert code == 0
    assert "in all 20 records" in shown


def test_errors_have_the_line_of_stdin(run: Run, tokenizer_dir: Path, tmp_path: Path) -> None:
    data = RECORDS + b"not JSON"
    flags = ("--tokenizer", str(tokenizer_dir), "-o", str(tmp_path / "out"))
    code, _, error = run(data, "build", "-", *flags)
    assert code == 2
    assert "<stdin>:21:" in error


@pytest.mark.parametrize(
    ("data", "what", "remedy"),
    [
        (b'[{"text": "a"}]', "a JSON array", "jq -c"),
        (b"\xef\xbb\xbf\n [1]", "a JSON array", "jq -c"),
        (b"PAR1 and more", "Parquet", "name of the file"),
        (b"ARROW1\0\0", "Arrow", "name of the file"),
        ('{"text": "a"}'.encode("utf-16"), "UTF-16", "iconv"),
        (b"PK\x03\x04 and more", "zip", "unzip"),
        (gzip.compress(RECORDS)[:200], "damaged", "again"),
    ],
)
def test_other_content_is_refused(
    data: bytes, what: str, remedy: str, run: Run, tokenizer_dir: Path, tmp_path: Path
) -> None:
    flags = ("--tokenizer", str(tokenizer_dir), "-o", str(tmp_path / "out"))
    code, _, error = run(data, "build", "-", *flags)
    assert code == InputUnreadable("", remedy="").exit_code
    assert what in error
    assert remedy in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-", "--part", "1/2"], "stdin cannot be used on several machines"),
        (["-", "other.jsonl"], "as the only input"),
        (["-", "-"], "as the only input"),
        (["-", "--eval-input", "x", "--limit", "2"], "x"),
    ],
)
def test_what_needs_files_is_refused(
    arguments: list[str], message: str, run: Run, tokenizer_dir: Path, tmp_path: Path
) -> None:
    flags = ("--tokenizer", str(tokenizer_dir), "-o", str(tmp_path / "out"))
    code, _, error = run(RECORDS, "build", *arguments, *flags)
    assert code == 2
    assert message in error


def test_files_of_settings_may_name_stdin_as_the_only_input(
    run: Run, tokenizer_dir: Path, tmp_path: Path
) -> None:
    config = tmp_path / "build.yaml"
    config.write_text(json.dumps({"inputs": ["-"], "tokenizer": str(tokenizer_dir)}))
    flags = ("--config", str(config), "-o", str(tmp_path / "out"))
    assert run(RECORDS, "build", *flags)[0] == 0
    config.write_text(json.dumps({"sources": [{"path": "-"}], "tokenizer": str(tokenizer_dir)}))
    assert run(RECORDS, "build", *flags, "--overwrite")[0] == 2
    with pytest.raises(ConfigError, match="stdin"):
        sftprep.build("-", tokenizer=str(tokenizer_dir), output=tmp_path / "python")


def test_a_terminal_or_a_closed_stdin_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stdin", Terminal())
    with pytest.raises(ConfigError, match="terminal"):
        stdin.stdin_source()
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(ConfigError, match="closed"):
        stdin.stdin_source()


@given(
    lines=st.lists(st.binary(max_size=30).map(lambda line: line.replace(b"\n", b"")), max_size=20),
    size=st.integers(1, 40),
    is_ended=st.booleans(),
)
def test_blocks_are_whole_lines(lines: list[bytes], size: int, is_ended: bool) -> None:
    data = b"{" + b"\n".join(lines) + (b"\n" if is_ended else b"")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stdin, "PARTITION_BYTES", size)
        blocks = [*read_blocks(io.BytesIO(data))]
    assert all(block.endswith(b"\n") for block in blocks)
    joined = b"".join(blocks)
    assert joined == (data if data.endswith(b"\n") else data + b"\n")


@pytest.mark.parametrize("data", [b"", b"\n\n"])
def test_stdin_without_records_is_named(
    data: bytes, run: Run, tokenizer_dir: Path, tmp_path: Path
) -> None:
    flags = ("--tokenizer", str(tokenizer_dir), "--workers", "1")
    code, _, error = run(data, "build", "-", "-o", str(tmp_path / "a"), *flags)
    assert code == 2
    assert "error: no usable record: no records in <stdin>\n" in error
    assert "--train-on" not in error
