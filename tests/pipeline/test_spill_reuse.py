"""A kept spill serves every length, treatment of long sequences and packing: the build is that of
an empty folder, and no record is tokenized again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sftprep import BuildConfig, build, verify
from sftprep.errors import EmptyInput
from tests.pipeline.builds import content
from tests.stream.plain_packs import rows
from tests.support import thorough

CUTS: list[dict[str, Any]] = [
    *(
        {"packing": packing, "overlong": overlong, "truncate_side": side}
        for packing in ("bfd", "none")
        for overlong, side in (
            ("truncate", "right"),
            ("truncate", "left"),
            ("split", "right"),
            ("drop", "right"),
            ("error", "right"),
        )
    ),
    {"packing": "wrapped"},
    {"packing": "bfd_split"},
    {"pack_window": 20, "lanes": 3},
    {"pack_window": 20, "lanes": 3, "overlong": "split"},
    {"eval_fraction": 0.2, "duplicates": "drop"},
    {"eval_fraction": 0.2, "eval_packing": "none", "overlong": "split"},
]
LENGTHS = (2, 7, 20, 45, 4096)
READS = {
    "text": {},
    "messages": {"train_on": "assistant"},
    "prompt-completion": {},
    "alpaca": {},
    "tokens": {},
}


def weighted(count: int) -> list[dict[str, Any]]:
    """Return conversations whose answers have loss weights."""
    chats = rows("messages", count, seed=1)
    for number, chat in enumerate(chats):
        for message in chat["messages"]:
            if message["role"] == "assistant":
                message["loss_weight"] = number % 3 / 2
    return chats


def outcome(folder: Path, **settings: Any) -> tuple[list[int], Any]:
    """Return the partitions of a build (reused, all), and its files or its error."""
    config = BuildConfig.of(
        output=str(folder),
        on_bad_record="quarantine",
        max_rejected="100%",
        shard_tokens=4000,
        keep_spill=True,
        overwrite=True,
        **settings,
    )
    try:
        report = build(config)
    except EmptyInput as error:
        return [], str(error)
    assert verify(folder).problems == []
    spills = sorted((folder / "spill").glob("*.arrow"))
    files = {name: data for name, data in content(folder).items() if not name.startswith("spill")}
    return [report.reused, len(spills)], files


@pytest.mark.parametrize("name", [*READS, "weights"])
def test_a_kept_spill_gives_the_bytes_of_a_new_build(
    name: str,
    records: Callable[..., str],
    tokenizer_dir: Path,
    tmp_path: Path,
) -> None:
    made = weighted(80) if name == "weights" else rows(name, 80)
    settings = {
        "inputs": [records(made[:50], "a.jsonl"), records(made[50:] + made[:9], "b.jsonl")],
        "tokenizer": str(tokenizer_dir),
        **READS.get(name, {}),
    }
    kept = tmp_path / "kept"
    outcome(kept, max_length=33, **settings)
    # Builds that compare records need spills with hashes of the records.
    outcome(kept, max_length=33, eval_fraction=0.5, **settings)
    spills = {path: path.stat().st_mtime_ns for path in (kept / "spill").glob("*.arrow")}
    assert len(spills) == 4
    built = 0
    # By default, half of the cuts, and the other half for the next kind of records.
    step = thorough(1, default=2)
    chosen = [*enumerate(CUTS)][[*READS, "weights"].index(name) % step :: step]
    for number, cut in chosen:
        max_length = LENGTHS[(number + len(name)) % len(LENGTHS)]
        reused, new = outcome(kept, max_length=max_length, **settings, **cut)
        _, fresh = outcome(tmp_path / f"{number}", max_length=max_length, **settings, **cut)
        assert new == fresh, (cut, max_length)
        if reused:
            built += 1
            assert reused == [2, 4]
        # Not one spill was made again, and no other one was added.
        found = {path: path.stat().st_mtime_ns for path in (kept / "spill").glob("*.arrow")}
        assert found == spills
    assert built > len(chosen) // 2


def test_the_treatment_of_long_sequences_is_not_part_of_the_name_of_a_spill(
    records: Callable[..., str], tokenizer_dir: Path, tmp_path: Path
) -> None:
    """Other settings are, as before: only what is applied after the spill may change."""
    path = records([{"prompt": f"one two {n}", "completion": "three four five"} for n in range(9)])

    def reused(**settings: Any) -> bool:
        config = BuildConfig.of(
            inputs=path,
            tokenizer=str(tokenizer_dir),
            output=str(tmp_path / "out"),
            keep_spill=True,
            overwrite=True,
            **{"max_length": 64, **settings},
        )
        return bool(build(config).reused)

    assert not reused()
    assert reused(max_length=5)
    assert reused(max_length=6, overlong="split", packing="none")
    assert not reused(train_on="all")
    assert reused(train_on="all", max_length=128)
    settings = json.loads((tmp_path / "out" / "manifest.json").read_text())["config"]
    assert settings["max_length"] == 128


def test_builds_of_other_lengths_have_other_digests_of_their_settings(
    records: Callable[..., str], folder_with: Callable[[str], Path], tmp_path: Path
) -> None:
    """The default length is that of the tokenizer, which the settings do not contain."""
    folder, digests = folder_with("{{ messages[0].content }}"), set()
    path = records([{"text": "one two three four five"}])
    config = folder / "tokenizer_config.json"
    for limit in (3, 5):
        values = {**json.loads(config.read_text()), "model_max_length": limit}
        config.write_text(json.dumps(values))
        output = tmp_path / str(limit)
        report = build(BuildConfig.of(inputs=path, tokenizer=str(folder), output=str(output)))
        assert report.manifest.max_length == limit
        digests.add(report.manifest.config_digest)
    assert len(digests) == 2


def test_kept_spills_of_other_builds_have_a_limit(
    records: Callable[..., str], tokenizer_dir: Path, tmp_path: Path
) -> None:
    """The oldest ones are removed, and those of the last build are kept."""
    kept: list[set[str]] = []
    for number in range(7):
        path = records(rows("text", 40, seed=number), f"{number}.jsonl")
        outcome(tmp_path / "o", inputs=path, tokenizer=str(tokenizer_dir))
        kept.append({path.name for path in (tmp_path / "o" / "spill").glob("*.arrow")})
    assert [len(names) for names in kept[:3]] == [1, 2, 3]
    assert len(kept[-1]) <= 5
    assert kept[-1] - kept[-2]
    assert not kept[0] & kept[-1]
