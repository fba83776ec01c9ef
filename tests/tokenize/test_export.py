"""An exported tokenizer equals the one in memory, and builds accept its file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sftprep import export_tokenizer, load_tokenizer, tokenizer_spec
from sftprep.errors import StorageError, TokenizerError
from sftprep.tokenize.loading.load import SPEC_SUFFIX

transformers = pytest.importorskip("transformers")


@pytest.fixture
def live(tokenizer_dir: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(str(tokenizer_dir))


def test_changes_in_memory_are_exported(live: Any, tmp_path: Path) -> None:
    plain = export_tokenizer(live, cache=tmp_path)
    assert plain.suffix == SPEC_SUFFIX
    assert export_tokenizer(live, cache=tmp_path) == plain
    live.add_tokens(["<new>"])
    live.chat_template = "{{ messages[0]['content'] }}"
    live.eos_token = "<|endoftext|>"
    changed = export_tokenizer(live, cache=tmp_path)
    assert changed != plain
    assert load_tokenizer(str(changed)) == tokenizer_spec(live)
    assert load_tokenizer(str(changed)).token_id("<new>") == 600
    assert load_tokenizer(str(plain)).token_id("<new>") is None


def test_a_damaged_file_is_reported_and_written_again(live: Any, tmp_path: Path) -> None:
    path = export_tokenizer(live, cache=tmp_path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(TokenizerError, match="is damaged"):
        load_tokenizer(str(path))
    assert export_tokenizer(live, cache=tmp_path) == path
    assert load_tokenizer(str(path)) == tokenizer_spec(live)


def test_a_cache_that_cannot_be_written_is_an_error(live: Any, tmp_path: Path) -> None:
    (tmp_path / "tokenizers").write_text("a file where a folder is needed")
    with pytest.raises(StorageError, match="cannot write the tokenizer"):
        export_tokenizer(live, cache=tmp_path)


def test_a_tokenizer_that_does_more_than_its_file_is_refused(live: Any, tmp_path: Path) -> None:
    class Shouting(type(live)):  # type: ignore[misc]
        def __call__(self, text: Any, **options: Any) -> Any:
            return super().__call__(text.upper() if len(text) > 60 else text, **options)

    live.__class__ = Shouting
    with pytest.raises(
        TokenizerError, match=r"does more than its tokenizer\.json|changes texts in Python"
    ):
        export_tokenizer(live, cache=tmp_path)
