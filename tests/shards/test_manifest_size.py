"""The expected sizes of a manifest and of the file of a group are close upper bounds."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sftprep.errors import ConfigError
from sftprep.shards import manifest_size as manifest_module
from sftprep.shards.group import Block, Group, GroupEntry, InputInfo, ShardInfo
from sftprep.shards.ledger import Ledger
from sftprep.shards.manifest import Manifest
from sftprep.shards.manifest_size import (
    check_group_size,
    check_manifest_size,
    group_sizes,
    manifest_bytes,
    manifest_sizes,
)

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
numbers = st.integers(0, 10**12)
settings_of_builds = st.dictionaries(texts, texts | numbers | st.lists(texts), max_size=5)
infos = st.builds(
    InputInfo,
    path=texts,
    bytes=numbers,
    digest=st.just("0" * 32),
    format=st.sampled_from(["text", "prompt-completion"]),
    lines=numbers,
    records=numbers,
    source=st.sampled_from(["", "näme", 'a"\n']),
    accounting=st.builds(Ledger, lines=numbers, left_out=st.just({"held_out": 5})),
    limit=st.none() | st.just(7),
    slices=st.lists(numbers, max_size=3).map(tuple),
)


def manifest_of(config=None, template=None, groups=0, shards=0) -> Manifest:
    packs = array("q", [10**9] * (shards // max(1, groups)))
    entry = GroupEntry("0" * 16, "0" * 64, packs, 9, 9, 9)
    return Manifest(
        config=config or {},
        config_digest="0" * 64,
        tokenizer={"name": "t"},
        chat_template=template,
        encoder={},
        template={},
        accounting=Ledger(),
        plan={},
        max_length=1,
        rows=1,
        tokens=1,
        trained_tokens=1,
        sftprep_version="0",
        groups=(entry,) * groups,
    )


@settings(max_examples=60, deadline=None)
@given(settings_of_builds, st.none() | texts, st.integers(0, 3), st.integers(0, 9))
def test_the_expected_size_of_a_manifest_is_an_upper_bound(config, template, groups, shards):
    sizes = manifest_sizes({"config": config, "chat_template": template}, groups, shards)
    content = manifest_of(config, template, groups, shards).to_json()
    # Without the bytes for unknown fields, which would hide an estimate that is too low.
    rest = len(manifest_of().to_json())
    known = sum(sizes.values()) - sizes["others"]
    assert len(content) - rest <= known
    assert known <= 1.6 * len(content) + 200


@settings(max_examples=60, deadline=None)
@given(st.lists(infos, max_size=4), st.lists(st.integers(1, 400), max_size=4))
def test_the_expected_size_of_the_file_of_a_group_is_an_upper_bound(inputs, rows):
    shards = tuple(
        ShardInfo(
            name=f"{'0' * 16}/shard-00000-{'0' * 16}.arrow",
            rows=packs,
            tokens=10**9,
            trained_tokens=10**9,
            bytes=10**9,
            sha256="0" * 64,
            blocks=(Block(10**7, "0" * 32),) * (-(-packs // 64) + 1),
        )
        for packs in rows
    )

    def size(infos, shards):
        group = Group("0" * 16, "0", 1, infos, Ledger(), {}, {}, {}, {}, 0, shards, "0", "2.0")
        return len(group.to_json())

    sizes = group_sizes(inputs, {}, len(rows), sum(rows) // 64)
    known = sum(sizes.values()) - sizes["others"]
    found = size(tuple(inputs), shards) - size((), ())
    assert found <= known
    assert known <= 1.6 * found + 600 * len(rows) + 200


@pytest.mark.parametrize(
    ("known", "groups", "what", "remedy"),
    [
        ({"chat_template": "x" * 2_000_000}, 1, "the chat template", "chat_template"),
        ({"config": {"text_field": "x" * 2_000_000}}, 1, "text_field", "shorten text_field"),
        ({"config": {"map": ["x" * 2_000_000]}}, 1, "map", "shorten map"),
        ({"config": {"sources": ["x" * 2_000_000]}}, 1, "the sources of the mixture", "patterns"),
        ({}, 6_000, "the entries of the groups", "raise group_bytes"),
    ],
)
def test_large_parts_of_a_manifest_are_named_with_their_remedies(
    monkeypatch, known, groups, what, remedy
):
    monkeypatch.setattr(manifest_module, "LARGEST_MANIFEST", 1 << 20)
    with pytest.raises(ConfigError, match=f"the largest parts are {what}") as caught:
        check_manifest_size(known, groups)
    assert remedy in caught.value.remedy
    manifest = manifest_of(known.get("config"), known.get("chat_template"), groups)
    with pytest.raises(ConfigError, match=f"the largest parts are {what}"):
        manifest_bytes(manifest)


@pytest.mark.parametrize(
    ("source", "shards", "blocks", "what", "remedy"),
    [
        ("x" * 200_000, 1, 1, "the names of the sources", "a short name"),
        ("", 6_000, 94, "the entries of the shards", "shard_tokens"),
        ("", 6, 31_250, "the entries of the shards", "shard_tokens"),
    ],
)
def test_large_parts_of_a_group_are_named_with_their_remedies(
    monkeypatch, source, shards, blocks, what, remedy
):
    monkeypatch.setattr(manifest_module, "LARGEST_MANIFEST", 1 << 20)
    inputs = [InputInfo("a", 0, "", "", 0, 0, source=source)] * 10
    with pytest.raises(ConfigError, match=f"the largest parts are {what}") as caught:
        check_group_size(inputs, {}, shards, blocks)
    assert remedy in caught.value.remedy
