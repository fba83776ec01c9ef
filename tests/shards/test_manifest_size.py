"""The expected size of a manifest is a close upper bound of its size."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sftprep.errors import ConfigError
from sftprep.shards import manifest_size as manifest_module
from sftprep.shards.ledger import Ledger
from sftprep.shards.manifest import InputInfo, Manifest, ShardInfo
from sftprep.shards.manifest_size import (
    check_manifest_size,
    expected_input,
    manifest_bytes,
    manifest_sizes,
)

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
numbers = st.integers(0, 10**10 - 1)
settings_of_builds = st.dictionaries(texts, texts | numbers | st.lists(texts), max_size=5)


@st.composite
def inputs(draw):
    """Entries of ordinary inputs, with the expected counts by reason."""
    reasons = draw(st.sets(st.sampled_from(["left_out.held_out", "extra.repeated"])))
    names = [f.name for f in dataclasses.fields(Ledger) if f.default == 0]
    found = []
    for path in draw(st.lists(texts, max_size=8)):
        counts = {name: draw(numbers) for name in (*names, *reasons)}
        info = InputInfo(
            path=path,
            bytes=draw(numbers),
            digest="0" * 32,
            format=draw(st.sampled_from(["text", "prompt-completion"])),
            first_ordinal=draw(numbers),
            lines=draw(numbers),
            records=draw(numbers),
            source=draw(st.sampled_from(["", "näme", 'a"\n'])),
            accounting=Ledger.from_counts(counts),
            limit=draw(st.none() | st.just(7)),
        )
        found.append(info)
    return sorted(reasons), tuple(found)


def manifest_of(infos, config=None, template=None, shards=0) -> Manifest:
    shard = ShardInfo("shard-00000-0123456789abcdef.arrow", 9, 9, 9, 9, "0" * 64, "0" * 32)
    return Manifest(
        config=config or {},
        config_digest="0" * 64,
        tokenizer={"name": "t"},
        chat_template=template,
        encoder={},
        template={},
        inputs=infos,
        accounting=Ledger(),
        plan={},
        max_length=1,
        rows=1,
        tokens=1,
        trained_tokens=1,
        shards=(shard,) * shards,
        sftprep_version="0",
    )


@settings(max_examples=60, deadline=None)
@given(inputs(), settings_of_builds, st.none() | texts, st.integers(0, 3))
def test_the_expected_size_is_an_upper_bound_and_close(made, config, template, shards):
    reasons, infos = made
    entries = [(expected_input(i.source, i.limit, reasons), [i.path]) for i in infos]
    known = {"config": config, "chat_template": template}
    sizes = manifest_sizes(known, entries, shards)
    content = manifest_of(infos, config, template, shards).to_json()
    # Without the bytes for unknown fields, which would hide an estimate that is too low.
    rest = len(manifest_of(()).to_json())
    assert len(content) - rest <= sum(sizes.values()) - sizes["others"]
    assert sum(sizes.values()) - sizes["others"] <= 1.6 * len(content) + 200


def test_many_inputs_are_refused_only_if_they_do_not_fit():
    entry = expected_input("data", None)
    with pytest.raises(
        ConfigError, match=r"the largest parts are the entries of the inputs"
    ) as caught:
        check_manifest_size({}, [(entry, ["x" * 100] * 90_000)])
    assert "join small input files" in caught.value.remedy
    check_manifest_size({}, [(entry, ["x" * 100] * 60_000)])


@pytest.mark.parametrize(
    ("known", "source", "shards", "what", "remedy"),
    [
        ({"chat_template": "x" * 2_000_000}, "", 1, "the chat template", "chat_template"),
        ({"config": {"text_field": "x" * 2_000_000}}, "", 1, "text_field", "shorten text_field"),
        ({"config": {"map": ["x" * 2_000_000]}}, "", 1, "map", "shorten map"),
        (
            {"config": {"sources": ["x" * 2_000_000]}},
            "",
            1,
            "the sources of the mixture",
            "patterns",
        ),
        ({}, "x" * 200_000, 1, "the names of the sources", "a short name"),
        ({}, "", 6_000, "the entries of the shards", "shard_tokens"),
    ],
)
def test_large_parts_are_named_with_their_remedies(
    monkeypatch, known, source, shards, what, remedy
):
    monkeypatch.setattr(manifest_module, "LARGEST_MANIFEST", 1 << 20)
    entries = [(expected_input(source, None), ["a"] * 10)]
    with pytest.raises(ConfigError, match=f"the largest parts are {what}") as caught:
        check_manifest_size(known, entries, shards)
    assert remedy in caught.value.remedy
    assert "join small" not in caught.value.remedy
    fields = {"config": known.get("config"), "template": known.get("chat_template")}
    infos = tuple(InputInfo("a", 0, "", "", 0, 0, 0, source=source) for _ in range(10))
    with pytest.raises(ConfigError, match=f"the largest parts are {what}"):
        manifest_bytes(manifest_of(infos, **fields, shards=shards))
