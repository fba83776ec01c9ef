"""A stream of transformed records resumes exactly, and has the packs of the build."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from sftprep import BuildConfig, Drop, build, open_shards
from sftprep.errors import ConfigError, MismatchError, RecordError
from sftprep.stream import Mixture, PackedStream, open_stream
from tests.stream.plain_packs import plain, plains, rows

MINE = """
from sftprep import Drop

def halves(record):
    words = record["text"].split()
    if len(words) % 5 == 0:
        return Drop("five")
    middle = len(words) // 2
    return [{"text": " ".join(part)} for part in (words[:middle], words[middle:]) if part]
"""


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    path = tmp_path_factory.mktemp("functions") / "mine.py"
    path.write_text(MINE)
    return f"{path}:halves"


def stream_of(source, tokenizer_dir, **more):
    chosen = {"max_length": 256, "pack_window": 30, "lanes": 4, "tokenizer": str(tokenizer_dir)}
    return PackedStream(source, config=BuildConfig.of(**chosen, **more))


@pytest.mark.parametrize("kind", ["files", "function"])
def test_a_transformed_stream_resumes_with_the_next_pack(kind, corpus, mine, tokenizer_dir):
    records = rows("text", 700, seed=3)
    source = corpus if kind == "files" else lambda: iter(records)
    stream = stream_of(source, tokenizer_dir, transform=mine)
    packs, states = [], []
    for pack in stream:
        packs.append(plain(pack))
        states.append(json.loads(json.dumps(stream.state_dict())))
    assert stream.counts["dropped.five"] > 50
    for at in (0, len(packs) // 2, len(packs) - 2):
        resumed = stream_of(source, tokenizer_dir, transform=mine)
        resumed.load_state_dict(states[at])
        assert plains(resumed) == packs[at + 1 :]


def test_a_transformed_stream_has_the_packs_of_the_build(corpus, mine, tokenizer_dir, tmp_path):
    settings = {"max_length": 256, "pack_window": 30, "lanes": 4, "tokenizer": str(tokenizer_dir)}
    build(corpus, output=str(tmp_path / "o"), order="keep", transform=mine, **settings)
    stream = open_stream(corpus, transform=mine, **settings)
    assert plains(stream) == plains(open_shards(tmp_path / "o"))


def test_a_stream_names_the_first_dropped_record_and_the_failed_one(tokenizer_dir):
    records = [{"n": n} for n in range(300)]

    def fail_late(record):
        if record["n"] == 250:
            raise ValueError("late")
        return Drop("odd") if record["n"] % 2 else {"text": f"text {record['n']}"}

    stream = stream_of(records, tokenizer_dir, transform=fail_late)
    with pytest.raises(RecordError, match="ValueError: late") as caught:
        list(stream)
    assert caught.value.line == 251
    assert stream.first_dropped == {"dropped.odd": ("300 records", 2)}


def test_the_state_of_a_stream_does_not_grow_with_the_reasons(tokenizer_dir):
    stream = stream_of(
        [{"n": n} for n in range(3000)],
        tokenizer_dir,
        transform=lambda r: Drop(f"id {r['n']}") if r["n"] % 10 else {"text": str(r["n"])},
    )
    assert len(list(stream)) > 1
    reasons = [name for name in stream.counts if name.startswith("dropped.")]
    assert sum(stream.counts[name] for name in reasons) == 2700
    assert len(reasons) <= 51 * 4
    assert len(json.dumps(stream.state_dict())) < 20_000


def test_each_source_of_a_stream_may_have_its_own_transform(corpus, mine, tokenizer_dir):
    asked = rows("prompt-completion", 300, seed=5)

    def mixture(function):
        return Mixture([corpus, lambda: iter(asked)], [2, 1], transforms=[mine, function])

    stream = stream_of(mixture(None), tokenizer_dir)
    packs = plains(stream)
    assert stream.counts["dropped.five"] > 50
    assert stream.counts["records"] == 1100
    first, resumed = (stream_of(mixture(None), tokenizer_dir) for _ in range(2))
    iterator = iter(first)
    before = [plain(next(iterator)) for _ in range(7)]
    resumed.load_state_dict(first.state_dict())
    assert before + plains(resumed) == packs
    with pytest.raises(MismatchError):
        stream_of(mixture(lambda r: r), tokenizer_dir).load_state_dict(first.state_dict())
    with pytest.raises(ConfigError, match="2 sources have 1 transforms"):
        Mixture([corpus, corpus], [1, 1], transforms=[mine])


SCRIPT = """
import json, sys
from sftprep.stream import open_stream
stream = open_stream({corpus!r}, tokenizer={tokenizer!r}, max_length=256, pack_window=30, lanes=4,
    transform=lambda record: {{"text": record["text"].upper()}}, transform_id={version!r})
if len(sys.argv) == 1:
    packs = iter(stream)
    for _ in range(5):
        next(packs)
    print(json.dumps(stream.state_dict()))
else:
    stream.load_state_dict(json.loads(sys.argv[1]))
    print(sum(1 for _ in stream))
"""


@pytest.mark.parametrize("version", [None, "v1"])
def test_a_lambda_needs_an_id_to_be_resumed_in_another_process(
    corpus, tokenizer_dir, tmp_path, version
):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(corpus=corpus, tokenizer=str(tokenizer_dir), version=version))
    first = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=True
    )
    second = subprocess.run(
        [sys.executable, str(script), first.stdout.strip()],
        capture_output=True,
        text=True,
        check=False,
    )
    if version is None:
        assert "MismatchError" in second.stderr
        assert "transform_id" in second.stderr
    else:
        assert second.returncode == 0, second.stderr
        assert int(second.stdout) > 20


def test_loader_workers_apply_a_lambda(corpus, tokenizer_dir):
    from sftprep.torch import StreamLoader

    settings = {"transform": lambda record: {"text": record["text"].upper()}}
    alone = plains(stream_of(corpus, tokenizer_dir, **settings))
    loader = StreamLoader(
        stream_of(corpus, tokenizer_dir, **settings), 1, lambda packs: packs[0], workers=2
    )
    assert sorted(plain(pack) for pack in loader) == sorted(alone)
