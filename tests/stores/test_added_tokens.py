"""The tokenizer in a build to which tokens were added, in stores and on the Hub."""

from __future__ import annotations

import datetime
import json

import pytest

from sftprep import build, push, read_manifest, verify
from sftprep.pipeline.output.garbage import collect_garbage
from sftprep.shards import tokenizer_paths
from tests.stores.builds import example_lines, put_object, small_settings


@pytest.mark.slow
def test_a_store_has_the_tokenizer_and_a_replaced_build_leaves_none(
    memory, small, base_tokenizer_dir, tmp_path
):
    (tmp_path / "rows.jsonl").write_bytes(example_lines(0, 12))
    settings = small_settings(base_tokenizer_dir, chat_template="chatml", eval_fraction=0.3)
    report = build(str(tmp_path / "rows.jsonl"), output=f"{memory}/o", **settings)
    paths = {*tokenizer_paths(report.manifest.tokenizer)}
    assert len(paths) == 2
    assert paths <= (memory / "o").names()
    assert verify(f"{memory}/o").ok
    assert collect_garbage(f"{memory}/o", datetime.timedelta(seconds=-60)) == []
    put_object(memory / "o", max(paths), b"{}", tmp_path)
    assert not verify(f"{memory}/o").ok
    small(memory / "o", overwrite=True)
    assert verify(f"{memory}/o").ok
    assert not paths & (memory / "o").names()


def test_a_pushed_build_has_the_tokenizer(hub, base_tokenizer_dir, tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(example_lines(0, 12))
    settings = small_settings(base_tokenizer_dir, chat_template="chatml")
    build(str(tmp_path / "rows.jsonl"), output=str(tmp_path / "build"), **settings)
    pushed = push(tmp_path / "build", "org/name")
    assert verify(pushed.url).ok
    manifest = read_manifest(pushed.url)
    (content,) = (
        manifest.folder.read_range(path, 0, 1 << 20)
        for path in tokenizer_paths(manifest.tokenizer)
        if path.endswith("tokenizer_config.json")
    )
    assert json.loads(content)["eos_token"] == "<|im_end|>"
