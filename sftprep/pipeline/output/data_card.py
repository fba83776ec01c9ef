"""The data card of a build, `README.md`: what it contains, and how to load it.

Its YAML block lists the shards of each split by their exact names, so `datasets` loads both splits
from the folder, and never the shards of another build in it. The card belongs to no digest.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from sftprep.config.build import BuildConfig
from sftprep.config.data import SourceEntry
from sftprep.errors import escape_control
from sftprep.shards.layout import EVAL_FOLDER, SHARD_FOLDER, tokenizer_paths
from sftprep.shards.manifest import Manifest
from sftprep.shards.ownership import mark_card
from sftprep.shards.schema import shard_columns, split_type

LISTED_SHARDS = 10_000
"""The largest number of shards that are listed: `datasets` needs about a millisecond for each."""
NOT_LISTED = "too-many-shards-to-list-see-README.md"
"""The name that replaces such a list, and that `datasets` shows in its error. Without any list, it
would guess the splits from the names of all files."""
_LISTED_ITEMS = 100
"""The largest number of items of other lists: sources, and settings such as the inputs."""
_FOLDERS = {"train": SHARD_FOLDER, "validation": f"{EVAL_FOLDER}/{SHARD_FOLDER}"}
_TRAINED = {
    "auto": "the completion of a record that has one, and otherwise every token",
    "all": "every token",
    "completion": "the completion",
    "assistant": "the turns of the assistant",
    "last-assistant": "the last turn of the assistant",
}


def data_card(
    manifest: Manifest,
    evaluation: Manifest | None,
    *,
    is_merged: bool = False,
    identity_line: str | None = None,
) -> bytes:
    """Return the data card of a build.

    Args:
        manifest: The manifest of the training build, whose files of groups can be read.
        evaluation: The manifest of the evaluation build, if there is one.
        is_merged: Whether the build was merged from others.
        identity_line: The line by which a later command finds that the build is up to date.
    """
    splits = {"train": manifest}
    if evaluation is not None:
        splits["validation"] = evaluation
    lines = [
        *([identity_line] if identity_line is not None else []),
        *_list_shards(splits),
        *_list_features(splits),
        "---",
        "",
        "# Tokenized sequences for supervised fine-tuning",
        "",
        f"Made with sftprep {manifest.sftprep_version}. {_describe_row(manifest)}",
        "",
        *_describe_splits(splits),
        *_describe_loading(splits),
        *_describe_sources(manifest),
        *_describe_tokens(manifest),
        *_describe_ledger(splits),
        *_describe_settings(splits, is_merged=is_merged),
    ]
    return mark_card("\n".join(lines).rstrip() + "\n")


# --- the YAML block -------------------------------------------------------------------------------


def _list_shards(splits: Mapping[str, Manifest]) -> Iterator[str]:
    """Yield the lines that name the files of each split."""
    is_listed = sum(manifest.num_shards for manifest in splits.values()) <= LISTED_SHARDS
    yield from ("configs:", "- config_name: default", "  data_files:")
    for split, manifest in splits.items():
        if not manifest.num_shards:
            continue
        yield from (f"  - split: {split}", "    path:")
        if is_listed:
            yield from (f"    - {_FOLDERS[split]}/{shard.name}" for shard in manifest.shards)
        else:
            yield f"    - {NOT_LISTED}"


def _list_features(splits: Mapping[str, Manifest]) -> Iterator[str]:
    """Yield the lines with the columns of all shards, of which some groups may lack some.

    `datasets` gives them the value None there.
    """
    columns: dict[str, str] = {}
    for manifest in splits.values():
        for group in manifest.read_groups():
            columns |= group.columns
    if columns:
        yield from ("dataset_info:", "  features:")
    for name in sorted(columns, key=_column_order):
        dtype, is_list = split_type(columns[name])
        kind = "sequence" if is_list else "dtype"
        yield from (f"  - name: {_to_yaml(name)}", f"    {kind}: {_to_yaml(dtype)}")


def _column_order(name: str) -> int:
    """Return the position of a column in shards; in JSON, they are sorted by their names."""
    known = [*shard_columns(2, position_ids=True, loss_weights=True)]
    return known.index(name) if name in known else len(known)


# --- the text -------------------------------------------------------------------------------------


def _describe_row(manifest: Manifest) -> str:
    if manifest.layout == "sequences":
        return (
            "Each row is a whole sequence: its token ids, and a mask of the trained tokens. Packs"
            " of any length are planned when the build is opened, by default of"
            f" {manifest.max_length:,} tokens."
        )
    return (
        "Each row is a pack: the token ids of one or more sequences, of up to"
        f" {manifest.max_length:,} tokens together, a mask of the trained tokens, and the length of"
        " each sequence."
    )


def _describe_splits(splits: Mapping[str, Manifest]) -> Iterator[str]:
    ledgers = [manifest.accounting for manifest in splits.values()]
    manifests = splits.values()
    yield from _table(
        ["split", *splits],
        [
            ["packs", *(f"{each.rows:,}" for each in manifests)],
            ["sequences", *(f"{each.sequences:,}" for each in ledgers)],
            ["tokens", *(f"{each.tokens:,}" for each in manifests)],
            ["trained tokens", *(f"{each.trained_tokens:,}" for each in manifests)],
            ["shards", *(f"{each.num_shards:,}" for each in manifests)],
            ["bytes", *(f"{each.shard_bytes:,}" for each in manifests)],
            ["`data_digest`", *(_code(each.data_digest) for each in manifests)],
        ],
    )


def _describe_loading(splits: Mapping[str, Manifest]) -> Iterator[str]:
    yield from ("## How to load it", "", "With every file checked against its digest:", "")
    opened = ["from sftprep.shards import open_shards", "", 'train = open_shards("DIR")']
    if "validation" in splits:
        opened.append(f'validation = open_shards("DIR/{EVAL_FOLDER}")')
    yield from _fenced("python", opened)
    if sum(manifest.num_shards for manifest in splits.values()) > LISTED_SHARDS:
        yield from (
            f"The build has more than {LISTED_SHARDS:,} shards, so this file does not list them,"
            " and `datasets.load_dataset` cannot load the folder by itself.",
            "",
        )
        return
    yield from ("With `datasets`, `DIR` being this folder or a repository on the Hub:", "")
    loaded = ["from datasets import load_dataset", "", 'splits = load_dataset("DIR")']
    yield from _fenced("python", [*loaded, *(f'splits["{split}"]' for split in splits)])
    notes = ["A token is trained where `completion_mask` is true."]
    if splits["train"].layout == "sequences":
        notes.append(
            "These are the stored sequences, each of them once; only `open_shards` repeats those"
            " that the build repeats, cuts and packs them."
        )
    else:
        notes.append(
            "The sequences of a pack must not attend to each other: `position_ids` (if stored)"
            " restart at 0 with each, and `seq_lengths` has their lengths."
        )
    yield from (" ".join(notes), "")


def _describe_sources(manifest: Manifest) -> Iterator[str]:
    yield from ("## Sources", "")
    counted = ("sequences", "tokens", "trained_tokens")
    rows = [
        [
            _code(source.name),
            "" if source.weight is None else f"{source.weight:g}",
            f"{source.records:,}",
            *(f"{getattr(source, name):,} ({source.shares[name]:.2f} %)" for name in counted),
        ]
        for source in manifest.sources[:_LISTED_ITEMS]
    ]
    is_weighted = any(source.weight is not None for source in manifest.sources)
    mix_by = manifest.config.get("mix_by", "records").replace("_", " ")
    weight = f"weight (by {mix_by})" if is_weighted else "weight"
    yield from _table(["source", weight, "records", "sequences", "tokens", "trained tokens"], rows)
    rest = len(manifest.sources) - len(rows)
    if rest:
        yield from (f"{rest:,} more sources are in `manifest.json`.", "")


def _describe_tokens(manifest: Manifest) -> Iterator[str]:
    tokenizer, template = manifest.tokenizer, manifest.template
    yield from ("## Tokenizer, template and mask", "")
    yield (
        f"- Tokenizer: {_code(tokenizer['name'])}, {tokenizer['vocab_size']:,} ids, fingerprint"
        f" {_code(tokenizer['fingerprint'])}"
    )
    if added := tokenizer.get("added"):
        tokens = ", ".join(_code(entry["content"]) for entry in added[:_LISTED_ITEMS])
        folder = next(iter(tokenizer_paths(tokenizer)), "").rpartition("/")[0]
        tokens = tokens.replace(r"\|", "|")  # it is escaped for tables only
        yield f"- Tokens that the build added to it, in {_code(folder)}: {tokens}"
    if "digest" in template:
        yield f"- Chat template: in `manifest.json`, digest {_code(template['digest'])}"
    else:
        yield "- Chat template: none"
    train_on = str(manifest.config.get("train_on"))
    yield f"- Trained: {_TRAINED.get(train_on, _code(train_on))} (`train_on: {train_on}`)"
    yield (
        f"- Packing: {_code(str(manifest.plan['strategy']))}, {manifest.plan['fill']:.2%} full;"
        f" longer sequences: {_code(str(manifest.config.get('overlong')))}"
    )
    for used in manifest.functions.get("used", ()):
        yield (
            f"- Function: `{used['setting']}` {_code(str(used['name']))}, digest"
            f" {_code(str(used['digest']))}"
        )
    yield ""


def _describe_ledger(splits: Mapping[str, Manifest]) -> Iterator[str]:
    """Yield what became of the records and tokens of each split."""
    yield from ("## What became of the records", "")
    for split, manifest in splits.items():
        ledger = manifest.accounting
        of_reason = [
            ("added", ledger.extra, ledger.tokens_extra, ledger.trained_extra),
            ("rejected", ledger.rejected, {}, {}),
            ("dropped", ledger.dropped, ledger.tokens_dropped, ledger.trained_dropped),
            ("left out", ledger.left_out, ledger.tokens_left_out, ledger.trained_left_out),
        ]
        cut = (ledger.truncated, ledger.tokens_truncated, ledger.trained_truncated)
        rows = [["read", *_numbers(ledger.records, ledger.tokens_in, ledger.trained_in)]]
        rows += [
            [
                f"{what}: {_code(reason)}",
                *_numbers(*(each.get(reason, 0) for each in (records, tokens, trained))),
            ]
            for what, records, tokens, trained in of_reason
            for reason in {**records, **tokens, **trained}
        ]
        rows.append(["truncated", *_numbers(*cut)])
        rows.append(["packed", *_numbers(ledger.sequences, ledger.tokens, ledger.trained_tokens)])
        yield from _table([split, "records or sequences", "tokens", "trained tokens"], rows)


def _describe_settings(splits: Mapping[str, Manifest], *, is_merged: bool) -> Iterator[str]:
    """Yield the settings other than the defaults, as a config file of the command."""
    yield from ("## How to make it again", "")
    if is_merged:
        yield from (
            "The build was merged from others with `sftprep merge`. Each of them was made with"
            " these settings and some of the inputs, which are those of all builds here:",
            "",
        )
    else:
        yield from ("Save these settings as `build.yaml`:", "")
    config = splits["train"].config
    settings = dict(_changed_settings(config))
    if any(manifest.accounting.rejected for manifest in splits.values()):
        settings |= {"on_bad_record": "quarantine", "max_rejected": "100%"}
    yield from _fenced("yaml", _yaml_lines(settings))
    yield from _fenced("", ["sftprep build --config build.yaml --output DIR"])
    if any(re.fullmatch("<.*>", name) for name in config.get("inputs", ())):
        yield from ("The inputs in angle brackets were data in memory.", "")


def _changed_settings(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the settings that are not the defaults."""
    defaults = json.loads(json.dumps(BuildConfig().flat()))
    # None is a default, or a setting in which merged builds differ.
    changed = {
        name: value
        for name, value in json.loads(json.dumps(config)).items()
        if value is not None and value != defaults.get(name)
    }
    if "sources" in changed:
        changed.pop("inputs", None)  # those of the sources
        changed["sources"] = [*map(_changed_entry, changed["sources"])]
    yield from changed.items()


def _changed_entry(entry: Mapping[str, Any]) -> dict[str, Any]:
    defaults = dataclasses.asdict(SourceEntry(("",)))
    return {name: value for name, value in entry.items() if value != defaults.get(name)}


# --- Markdown and YAML ----------------------------------------------------------------------------


def _numbers(*numbers: int) -> list[str]:
    return [f"{number:,}" if number else "" for number in numbers]


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(header)} |"
    yield f"|---|{'---:|' * (len(header) - 1)}"
    yield from (f"| {' | '.join(row)} |" for row in rows)
    yield ""


def _code(text: str) -> str:
    """Return text as code, which Markdown shows as it is, also in a table."""
    text = escape_control(text).replace("\n", r"\n").replace("|", r"\|")
    fence = "`" * (_longest_run(text) + 1)
    space = " " if len(fence) > 1 else ""
    return f"{fence}{space}{text}{space}{fence}"


def _fenced(language: str, lines: Iterable[str]) -> Iterator[str]:
    found = [*lines]
    fence = "`" * max(3, _longest_run("\n".join(found)) + 1)
    yield from (f"{fence}{language}", *found, fence, "")


def _longest_run(text: str) -> int:
    """Return the length of the longest run of backticks."""
    return max(map(len, re.findall("`+", text)), default=0)


def _yaml_lines(settings: Mapping[str, Any]) -> Iterator[str]:
    for name, value in settings.items():
        if not isinstance(value, list):
            yield f"{name}: {_to_yaml(value)}"
            continue
        yield f"{name}:"
        yield from (f"- {_to_yaml(item)}" for item in value[:_LISTED_ITEMS])
        if len(value) > _LISTED_ITEMS:
            yield f"# and {len(value) - _LISTED_ITEMS:,} more, see `config` in manifest.json"


# Characters that are allowed in JSON, and not in YAML.
_NOT_PRINTABLE = re.compile("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]")


def _to_yaml(value: Any) -> str:
    """Return a JSON value as YAML. JSON is YAML, apart from some characters."""
    text = json.dumps(value, ensure_ascii=False)
    return _NOT_PRINTABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
