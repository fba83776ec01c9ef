"""The lines of a summary about the tokenizer: the encoder, and tokens that were added."""

from __future__ import annotations

from collections.abc import Iterator

from sftprep.errors import escape_control, format_count
from sftprep.shards.layout import tokenizer_paths
from sftprep.shards.manifest import Manifest

_MOST_TOKENS = 8


def tokenizer_lines(manifest: Manifest) -> Iterator[str]:
    """Yield what the user should know about the tokenizer of a build."""
    encoder = manifest.encoder
    # Why no faster encoder was used, if the user did not choose the encoder.
    refused = [f"{each['encoder']}: {each['reason']}" for each in encoder.get("refused", ())]
    if refused:
        yield escape_control(f"encoder {encoder['encoder']} ({'; '.join(refused)})")
    if added := manifest.tokenizer.get("added", ()):
        shown = " ".join(entry["content"] for entry in added[:_MOST_TOKENS])
        more = f" and {len(added) - _MOST_TOKENS} more" if len(added) > _MOST_TOKENS else ""
        folder = next(iter(tokenizer_paths(manifest.tokenizer)), "").rpartition("/")[0]
        yield escape_control(
            f"tokenizer: {format_count(len(added), 'token')} of the chat template added: {shown}"
            f"{more}; it is in {folder}, and sfttrain resizes the embedding of the model for it"
        )
