"""The settings of the output folder, and of the execution of a build."""

from __future__ import annotations

from dataclasses import dataclass

from sftprep.config.validation import (
    ExecutorChoice,
    Layout,
    OnBadRecord,
    check_choice,
    check_integer,
    is_url,
    local_folder,
    output_place,
    parse_part,
)
from sftprep.errors import ConfigError, setting

GROUP_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class OutputConfig:
    """The output folder, and the execution of the build.

    Of these settings, only `layout`, `position_ids`, `shard_tokens` and `group_bytes` change the
    bytes of the shards.
    """

    output: str = ""
    """Folder of the build, or its URL: s3://bucket/folder, hf://datasets/org/name."""
    overwrite: bool = False
    """Replace a finished build in the output folder."""
    layout: Layout = "packs"
    """packs: shards contain packs; sequences: shards contain whole sequences, which are cut and
    packed when they are read, with any max_length, packing or seed."""
    position_ids: bool = True
    """Store position ids in the shards; otherwise readers derive them from seq_lengths."""
    shard_tokens: int | None = None
    """Approximate number of tokens in a shard file. Default: 4 million, and 16 million in a group
    of 64 million or more."""
    group_bytes: int = GROUP_BYTES
    """Size of a group in bytes of input: the packs of a group are planned together, and larger
    inputs become several groups. Default: 1 GiB."""
    workers: int | None = None
    """Worker processes. Default: one for each 24 MB of input, at most one per core."""
    executor: ExecutorChoice = "local"
    """local: worker processes on this machine; ray: tasks on a Ray cluster, all of whose machines
    reach the inputs and the output under the same paths."""
    ray_address: str | None = None
    """Address of the Ray cluster (auto, or host:port). Default: one that is started here."""
    part: str | None = None
    """I/K: write only the I-th of K parts of the groups, on one of several machines that share the
    output folder. The same command without it writes what is missing and finishes the build."""
    on_bad_record: OnBadRecord = "error"
    """error: stop at the first record that cannot be used; quarantine: write it to a file in
    DIR/rejected, and continue."""
    max_rejected: str = "1%"
    """Maximum number of quarantined records: a percentage (1%) or a count (250)."""
    scratch: str | None = None
    """Local folder of the intermediate files of an output in a store. Default: in the cache."""
    keep_spill: bool = False
    """Keep the intermediate files; a later build of the same records reuses them, also with other
    lengths or packing."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "output", output_place(self.output, setting("output")))
        if self.scratch is not None:
            object.__setattr__(self, "scratch", local_folder(self.scratch, setting("scratch")))
            if not is_url(self.output):
                raise ConfigError(
                    f"{setting('scratch')} is for an output in a store, and {setting('output')} is"
                    f" {self.output}",
                    remedy=f"leave out {setting('scratch')}",
                )
        check_choice(setting("layout"), self.layout, Layout)
        check_choice(setting("on_bad_record"), self.on_bad_record, OnBadRecord)
        check_choice(setting("executor"), self.executor, ExecutorChoice)
        check_integer(self.workers, setting("workers"), 1, 4096)
        check_integer(self.shard_tokens, setting("shard_tokens"), 1, 2**31 - 1)
        check_integer(self.group_bytes, setting("group_bytes"), 1 << 16, 1 << 44)
        parse_part(self.part, setting("part", self.part))
        self.rejected_limit(0)  # raises for an invalid `max_rejected`, before any work is done

    def rejected_limit(self, records: int) -> float:
        """Return how many of `records` may be rejected.

        Raises:
            ConfigError: `max_rejected` is neither a percentage nor a count.
        """
        # Python users may write a count as a number. A fraction would be ambiguous: 1.0 is neither
        # certainly 100 % nor certainly one record.
        is_text = type(self.max_rejected) in (str, int)
        text = str(self.max_rejected).strip() if is_text else ""
        try:
            value = float(text.removesuffix("%"))
        except ValueError:
            value = -1.0
        if not 0 <= value < float("inf") or (text.endswith("%") and value > 100):
            raise ConfigError(
                f"{setting('max_rejected')} is {self.max_rejected!r}",
                remedy="write a percentage such as 1%, or a count such as 250",
            )
        return value / 100 * records if text.endswith("%") else value
