"""Remote code runs only if the user allowed it, for the named model, at a fixed commit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from sftprep import build, load_tokenizer
from sftprep.errors import ConfigError, MismatchError, TokenizerError
from sftprep.stream import open_stream
from sfttrain import ModelConfig
from sfttrain.cli.arguments import read_arguments
from sfttrain.cli.main import main
from sfttrain.models.build_tokenizer import tokenizer_for
from sfttrain.models.loading import check_match, load_model
from sfttrain.models.remote_code import check_code_is_pinned, check_code_references, code_that_runs
from sfttrain.models.tokenizer import load_required_tokenizer
from tests.sfttrain.tiny import tiny_model
from tests.sfttrain.trainer_factory import COMPLETIONS, model_folder
from tests.shards.builds import rewritten


@pytest.fixture
def model(tmp_path: Path, tokenizer_dir: Path) -> Path:
    return model_folder(tmp_path / "model", tokenizer_dir)


def with_code(folder: Path, source: Path, mark: Path) -> Path:
    """Create a tokenizer with a Python class that creates the file `mark` when it is run."""
    folder.mkdir()
    shutil.copy(source / "tokenizer.json", folder)
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["tok.Evil", "tok.Evil"]}}
        )
    )
    (folder / "tok.py").write_text(
        f"open({str(mark)!r}, 'w').write('x')\n"
        "from transformers import PreTrainedTokenizerFast\n"
        "class Evil(PreTrainedTokenizerFast): pass\n"
    )
    return folder


@pytest.fixture
def hostile(tmp_path: Path, model: Path) -> tuple[Path, Path]:
    """Return shards whose manifest names a tokenizer with code, and the mark of that code."""
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in COMPLETIONS))
    build(data, tokenizer=model, output=tmp_path / "shards", max_length=64)
    tokenizer = with_code(tmp_path / "tok", model, tmp_path / "code-ran")
    names = {"name": str(tokenizer), "fingerprint": "0" * 64}
    rewritten(tmp_path / "shards", lambda manifest: manifest["tokenizer"].update(names))
    return tmp_path / "shards", tmp_path / "code-ran"


@pytest.mark.parametrize("allowed", [[], ["--allow_mismatch", "tokenizer"]])
@pytest.mark.parametrize("model_has_tokenizer", [True, False])
def test_code_that_a_manifest_names_is_never_run(
    hostile: tuple[Path, Path],
    model: Path,
    tmp_path: Path,
    capsys: Any,
    allowed: list[str],
    model_has_tokenizer: bool,
) -> None:
    shards, mark = hostile
    if not model_has_tokenizer:
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            (model / name).unlink()
    code = main(
        [
            *("run", str(shards), "--model", str(model), "--output_dir", str(tmp_path / "o")),
            *("--use_cpu", "--max_steps", "1", "--trust_remote_code", "true", *allowed),
        ]
    )
    assert not mark.exists()
    error = capsys.readouterr().err
    if model_has_tokenizer and not allowed:
        assert code == 2
        assert "another tokenizer" in error
    else:
        assert code == 0, error
        assert f"code of {model} is run" in error


def test_the_tokenizers_are_compared_before_that_of_the_shards_is_loaded(
    model: Path, tmp_path: Path
) -> None:
    class Manifest:
        max_length = 10
        chat_template = None
        tokenizer = {"name": "org/not-to-be-fetched", "fingerprint": "0" * 64}  # noqa: RUF012

    tokenizer, fingerprint = tokenizer_for(ModelConfig(model_name_or_path=str(model)), Manifest())
    assert tokenizer is not None
    assert fingerprint != "0" * 64


@pytest.mark.parametrize(
    "settings",
    [
        "trust_remote_code: true",
        "trust_remote_code: 'True'",
        "trust-remote-code: 1",
        "model_init_kwargs: {trust_remote_code: true}",
        "model_init_kwargs: '{\"trust_remote_code\": true}'",
    ],
)
def test_a_settings_file_cannot_allow_code(tmp_path: Path, settings: str) -> None:
    (tmp_path / "run.yaml").write_text(settings)
    command = ["DIR", "--model", "M", "--output_dir", str(tmp_path / "o"), "--config"]
    with pytest.raises(ConfigError, match="accepted only on the command line"):
        read_arguments([*command, str(tmp_path / "run.yaml")])
    (tmp_path / "run.yaml").write_text("trust_remote_code: false")
    request = read_arguments([*command, str(tmp_path / "run.yaml"), "--trust_remote_code"])
    assert request.model.trust_remote_code


def test_code_of_a_repository_needs_a_commit(tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    for revision in ("main", "v1.0", commit[:39], commit.upper()):
        config = ModelConfig("org/model", model_revision=revision, trust_remote_code=True)
        with pytest.raises(ConfigError, match=f"org/model at {revision}"):
            check_code_is_pinned(config)
    pinned = ModelConfig("org/model", model_revision=commit, trust_remote_code=True)
    check_code_is_pinned(pinned)
    assert code_that_runs(pinned) == f"org/model@{commit}"
    local = ModelConfig(str(tmp_path), trust_remote_code=True)
    check_code_is_pinned(local)
    assert code_that_runs(local) == str(tmp_path)
    assert code_that_runs(ModelConfig("org/model")) == ""


def test_the_source_of_executed_code_is_recorded_in_the_checkpoint(
    model: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in COMPLETIONS))
    build(data, tokenizer=model, output=tmp_path / "shards", max_length=64)
    arguments = ["run", str(tmp_path / "shards"), "--model", str(model), "--use_cpu"]
    arguments += ["--output_dir", str(tmp_path / "o"), "--max_steps", "1", "--save_steps", "1"]
    assert main([*arguments, "--trust_remote_code"]) == 0
    state = json.loads((tmp_path / "o" / "checkpoint-1" / "sft_state.json").read_text())
    assert state["code"] == str(model)


def test_a_mismatch_is_an_error_without_code_too(
    hostile: tuple[Path, Path], model: Path, tmp_path: Path
) -> None:
    from sftprep import open_shards

    shards = open_shards(hostile[0])
    _, fingerprint = tokenizer_for(ModelConfig(model_name_or_path=str(model)), shards.manifest)
    with pytest.raises(MismatchError, match="another tokenizer"):
        check_match(tiny_model("llama", vocab_size=600), shards, fingerprint)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", {"auto_map": {"AutoModelForCausalLM": "evil/repo--modeling_evil.Evil"}}),
        ("config.json", {"auto_map": {"AutoConfig": "/other/dir--configuration_evil.Evil"}}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["/o--m.T", None]}}),
        ("config.json", {"auto_map": {"AutoConfig": "/abs/other/evil.Evil"}}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["../other/evil.Evil", None]}}),
        ("adapter_config.json", {"base_model_name_or_path": "evil/base"}),
    ],
)
def test_code_outside_of_the_named_model_is_refused(
    model: Path, file: str, content: dict[str, Any]
) -> None:
    path = model / file
    own = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**own, **content}))
    config = ModelConfig(str(model), trust_remote_code=True)
    for load in (
        lambda: check_code_references(str(model)),
        lambda: load_model(config, device=torch.device("cpu")),
        lambda: load_required_tokenizer(str(model), trust_remote_code=True),
    ):
        with pytest.raises(ConfigError, match="refers to code in"):
            load()


@pytest.mark.parametrize(
    "content",
    [
        {"attn_implementation": "kernels-community/flash-attn2@0123"},
        {"_attn_implementation": {"": "eager", "text_config": "evil/x"}},
        {"text_config": {"_attn_implementation": "evil/x"}},
        {"_experts_implementation": "evil/x"},
    ],
)
def test_kernels_that_only_the_configuration_names_are_refused(
    model: Path, content: dict[str, Any]
) -> None:
    path = model / "config.json"
    own = json.loads(path.read_text())
    path.write_text(json.dumps({**own, **content}))
    with pytest.raises(ConfigError, match="which are code that the command line does not name"):
        load_model(ModelConfig(str(model)), device=torch.device("cpu"))
    path.write_text(json.dumps({**own, "_attn_implementation": "eager"}))
    load_model(ModelConfig(str(model)), device=torch.device("cpu"))


def test_kernels_of_a_base_model_or_a_subfolder_are_refused(model: Path, tmp_path: Path) -> None:
    content = {**json.loads((model / "config.json").read_text()), "attn_implementation": "evil/x"}
    outer, adapter = tmp_path / "outer", tmp_path / "adapter"
    shutil.copytree(model, outer / "sub")
    (outer / "sub" / "config.json").write_text(json.dumps(content))
    adapter.mkdir()
    base = {"base_model_name_or_path": str(outer / "sub"), "peft_type": "LORA"}
    (adapter / "adapter_config.json").write_text(json.dumps(base))
    for folder, options in ((outer, {"subfolder": "sub"}), (adapter, {})):
        with pytest.raises(ConfigError, match="names the kernels evil/x"):
            load_model(ModelConfig(str(folder)), device=torch.device("cpu"), options=options)


def test_code_of_the_named_model_is_not_refused(model: Path) -> None:
    path = model / "config.json"
    code = {"AutoConfig": "configuration_own.Own", "AutoModel": f"{model}--modeling_own.Own"}
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": code}))
    check_code_references(str(model))


def test_a_revision_is_refused_for_a_folder_that_takes_the_place_of_a_repository(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The code and the weights of the folder would be used instead of those of the commit."""
    monkeypatch.chdir(tmp_path)
    mark = tmp_path / "code-ran"
    (tmp_path / "Qwen").mkdir()
    with_code(tmp_path / "Qwen" / "Q", model, mark)
    commit = "0123456789" * 4
    config = ModelConfig(model_name_or_path="Qwen/Q", model_revision=commit, trust_remote_code=True)
    for use in (
        lambda: check_code_is_pinned(config),
        lambda: load_model(config, device=torch.device("cpu")),
        lambda: load_model(
            ModelConfig(model_name_or_path="Qwen/Q"),
            device=torch.device("cpu"),
            options={"revision": "v2"},
        ),
        lambda: load_required_tokenizer("Qwen/Q", trust_remote_code=True, revision=commit),
    ):
        with pytest.raises(ConfigError, match="is for the Hub, but Qwen/Q is a local folder"):
            use()
    assert not mark.exists()
    with pytest.raises(TokenizerError, match="which has no revision v2"):
        load_tokenizer("Qwen/Q", revision="v2")
    assert load_model(ModelConfig(model_name_or_path=str(model)), device=torch.device("cpu"))


def test_a_revision_is_refused_for_data_that_take_the_place_of_a_repository(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "data").mkdir(parents=True)
    (tmp_path / "org" / "data" / "a.jsonl").write_text('{"text": "a b c"}\n' * 9)
    settings = {"tokenizer": str(model), "max_length": 64, "revision": "v2"}
    with pytest.raises(ConfigError, match="but org/data is a local path"):
        build("org/data", output=tmp_path / "out", **settings)
    with pytest.raises(ConfigError, match="but org/data is a local path"):
        open_stream("org/data", **settings)
    build("./org/data", output=tmp_path / "out", tokenizer=model, max_length=64)
