"""Every record that an input names is read once, and what is not read is logged or an error."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from sftprep import build
from sftprep.errors import ConfigError, FormatError, InputNotFound, InputUnreadable
from sftprep.sources.discovery.files import find_files
from sftprep.sources.discovery.hub import is_hub_name
from tests.faults.test_paths import ROWS


def add(path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(ROWS)
    return str(path)


def run_as_nobody(folder: Path, code: str, *arguments: object) -> list[str]:
    """Run code as a user who is not root, for whom permissions apply, and return its output."""
    for parent in (folder, *folder.parents):
        if "pytest" in str(parent):  # only its owner may enter these
            parent.chmod(stat.S_IMODE(parent.stat().st_mode) | 0o055)
    code = (
        "import os, sys\n"
        "from sftprep.errors import SftprepError\n"
        "from sftprep.pipeline.output.folder import claim_output\n"
        "from sftprep.sources.discovery.files import find_files\n"
        "from sftprep.sources.discovery.hub import is_hub_name\n"
        "from pathlib import Path\n"
        "if os.getuid() == 0: os.setgid(65534); os.setuid(65534)\n"
        "for named in sys.argv[1:]:\n"
        f"    try: {code}\n"
        "    except SftprepError as error: print(error.exit_code, error.message)\n"
    )
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = {**os.environ, "SFTPREP_CACHE": str(folder / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout.splitlines()


@pytest.fixture
def build_into(records, tokenizer_dir, tmp_path):
    """Return a function that builds into a folder."""
    rows = records([{"text": f"a {k}"} for k in range(20)], "rows.jsonl")

    def run(output, **settings):
        build(rows, tokenizer=tokenizer_dir, output=output, overwrite=True, **settings)
        return Path(output)

    return run


def test_intermediate_files_are_an_error_by_name_and_skipped_in_a_search(
    build_into, tmp_path, caplog
):
    top = tmp_path / "in"
    root = build_into(top / "prev", keep_spill=True)
    (tmp_path / "link").symlink_to(root / "spill")
    spill = next((root / "spill").glob("[0-9a-f]*.arrow"))
    for named in (spill, root / "spill", root / "spill" / "*.arrow", tmp_path / "link" / "*"):
        with pytest.raises(FormatError, match="intermediate files of a build"):
            find_files((str(named),))
    shards = sorted(map(str, (root / "shards").rglob("*.arrow")))
    assert find_files((f"{root}/shards/*/*.arrow",)) == shards
    add(root / "more" / "a.jsonl")
    for pattern in ("**/*.*l*", "*/*.jsonl"):
        caplog.clear()
        assert find_files((f"{root}/{pattern}",)) == [f"{root}/more/a.jsonl"]
        assert f"{root}/spill (intermediate files of a build)" in caplog.text


def test_a_link_to_an_intermediate_file_is_skipped(build_into, tmp_path, caplog):
    root = build_into(tmp_path / "prev", keep_spill=True)
    first = add(tmp_path / "in" / "a.jsonl")
    spill = next((root / "spill").glob("[0-9a-f]*.arrow"))
    (tmp_path / "in" / "s.arrow").symlink_to(spill)
    assert find_files((str(tmp_path / "in"),)) == [first]
    assert "in/s.arrow (intermediate files of a build)" in caplog.text


def test_hard_links_are_the_same_file(tmp_path, caplog):
    first = add(tmp_path / "in" / "a.jsonl")
    for name in ("in/b.jsonl", "in/sub/c.jsonl", "outside.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        os.link(first, tmp_path / name)
    assert find_files((str(tmp_path / "in"),)) == [first]
    assert "in/b.jsonl" in caplog.text
    assert "in/sub/c.jsonl" in caplog.text
    assert find_files((f"{tmp_path}/in/*.jsonl",)) == [first]
    with pytest.raises(ConfigError, match="named twice"):
        find_files((first, str(tmp_path / "outside.jsonl")))


def test_a_hard_link_is_not_both_trained_and_evaluated(tokenizer_dir, tmp_path):
    first = add(tmp_path / "a.jsonl")
    os.link(first, tmp_path / "b.jsonl")
    with pytest.raises(ConfigError, match="named twice"):
        build(
            first,
            tokenizer=tokenizer_dir,
            output=tmp_path / "o",
            eval_input=str(tmp_path / "b.jsonl"),
        )


def test_a_hard_link_of_a_shard_in_the_output_folder_is_not_read(build_into, tmp_path, caplog):
    output = build_into(tmp_path / "o")
    first = add(tmp_path / "in" / "a.jsonl")
    os.link(next((output / "shards").rglob("*.arrow")), tmp_path / "in" / "b.arrow")
    assert find_files((str(tmp_path / "in"),), output=str(output)) == [first]
    assert "in/b.arrow (the output folder)" in caplog.text


def test_linked_folders_that_are_not_read_by_another_path_are_logged(tmp_path, caplog):
    top = tmp_path / "in"
    first, second = add(top / "a.jsonl"), add(top / "sub" / "b.jsonl")
    add(tmp_path / "outside" / "c.jsonl")
    add(top / ".store" / "v1" / "d.jsonl")
    for name, target in {
        "outside_link": "../outside",
        "hidden_link": ".store/v1",
        "sub_link": "sub",
        "loop": ".",
    }.items():
        (top / name).symlink_to(target)
    for named in (str(top), f"{top}/**/*.jsonl", f"{top}/**"):
        caplog.clear()
        assert find_files((named,)) == [first, second]
        assert f"{top}/hidden_link, {top}/outside_link (links to folders" in caplog.text
        assert f"{top}/.store (hidden)" in caplog.text
        assert "sub_link" not in caplog.text
        assert "loop" not in caplog.text


def test_hidden_data_is_logged(tmp_path, caplog):
    first = add(tmp_path / "a.jsonl")
    for name in (".h.jsonl", ".hidden/b.jsonl", ".git/config", ".notes", ".DS_Store"):
        add(tmp_path / name)
    shown = f"not read: {tmp_path}/.git, {tmp_path}/.h.jsonl, {tmp_path}/.hidden (hidden)"
    for named in (str(tmp_path), f"{tmp_path}/*"):
        caplog.clear()
        assert find_files((named,)) == [first]
        assert [record.getMessage() for record in caplog.records] == [shown]
    caplog.clear()
    assert find_files((f"{tmp_path}/a*",)) == [first]
    assert find_files((f"{tmp_path}/.h*l", first)) == [f"{tmp_path}/.h.jsonl", first]
    assert not caplog.records


@pytest.mark.parametrize("mode", [0o000, 0o444, 0o111])
@pytest.mark.parametrize("name", ["locked", ".locked"])
def test_folders_that_cannot_be_read_are_errors(tmp_path, name, mode):
    add(tmp_path / "a.jsonl")
    add(tmp_path / name / "sub" / "b.jsonl")
    named = [tmp_path, f"{tmp_path}/**/*.jsonl", f"{tmp_path}/**/sub/b.jsonl"]
    if name == "locked":
        named += [f"{tmp_path}/*/sub/b.jsonl", tmp_path / name / "sub" / "*.jsonl"]
    (tmp_path / name).chmod(mode)
    try:
        lines = run_as_nobody(tmp_path, "print(find_files((named,)))", *named)
    finally:
        (tmp_path / name).chmod(0o755)
    if mode == 0o111 and name == "locked":
        lines = lines[:3]  # a path without wildcards can be opened without listing its folders
    elif mode == 0o444 and name == ".locked":
        assert len(lines) == len(named)  # it can be listed, and is not read
        return
    assert all(line.startswith(f"2 cannot read {tmp_path}/{name}") for line in lines), lines


@pytest.mark.parametrize(
    "name", ["metadata.json", "config.json", "state.json", "manifest.json", "README.JSONL"]
)
def test_data_with_names_of_metadata_is_logged(tmp_path, caplog, name):
    first = add(tmp_path / "in" / "a.jsonl")
    add(tmp_path / "in" / name)
    assert find_files((str(tmp_path / "in"),)) == [first]
    assert f"{tmp_path}/in/{name} (files with names of metadata" in caplog.text


def test_folders_that_match_a_pattern_are_searched(build_into, tmp_path, caplog):
    first = add(tmp_path / "in" / "a.jsonl")
    second = add(tmp_path / "in" / "part.jsonl" / "p" / "0.jsonl")
    third = add(tmp_path / "in" / "z" / "b.jsonl")
    build_into(tmp_path / "in" / "prev")
    assert find_files((f"{tmp_path}/in/*.jsonl",)) == [first, second]
    assert find_files((f"{tmp_path}/in/*/p",)) == [second]
    assert find_files((f"{tmp_path}/in/*",)) == [first, second, third]
    assert f"{tmp_path}/in/prev (a build of sftprep" in caplog.text
    assert find_files((f"{tmp_path}/in/**",)) == [first, second, third]


SHARDS_BY_NAME = ("in/*/shards", "in/*/shards/*/*.arrow", "in/**/shards/*/*.arrow")


@pytest.mark.parametrize("damage", ["missing", "short"])
def test_shards_of_a_build_without_its_manifest_are_logged(build_into, tmp_path, caplog, damage):
    root = build_into(tmp_path / "in" / "prev")
    first = add(tmp_path / "in" / "a.jsonl")
    shards = sorted(map(str, (root / "shards").rglob("*.arrow")))
    if damage == "missing":
        (root / "manifest.json").unlink()
    else:
        os.truncate(root / "manifest.json", 50)
    for named in (str(tmp_path / "in"), f"{tmp_path}/in/**/*.*l*", f"{tmp_path}/in/*"):
        caplog.clear()
        assert find_files((named,)) == [first]
        assert f"{root}/shards (shards of a build without a manifest" in caplog.text
    for named in (root, root / "sh*", root / "**" / "*.arrow", root / "*" / "*.arrow"):
        caplog.clear()
        with pytest.raises(InputNotFound):
            find_files((str(named),))
        assert f"{root}/shards (shards of a build without a manifest" in caplog.text
    for named in (root / "shards", root / "shards" / "*", *SHARDS_BY_NAME):
        caplog.clear()
        assert find_files((str(tmp_path / named),)) == shards
        assert not caplog.records
    # Other data in a folder of that name is read.
    Path(shards[0]).write_bytes(ROWS)
    assert len(find_files((str(tmp_path / "in"),))) == 2


def test_shards_of_a_finished_build_are_read_only_if_their_folder_is_named(
    build_into, tmp_path, caplog
):
    root = build_into(tmp_path / "in" / "prev")
    shards = sorted(map(str, (root / "shards").rglob("*.arrow")))
    for pattern in ("**/*.arrow", "*/*.arrow", "*s/*", "sh*"):
        caplog.clear()
        with pytest.raises(InputNotFound):
            find_files((f"{root}/{pattern}",))
        assert f"not read: {root}/shards (shards of a build, which" in caplog.text
    with pytest.raises(FormatError, match="is a build of sftprep"):
        find_files((str(root),))
    for named in (root / "shards", root / "shards" / "*", *SHARDS_BY_NAME[:2]):
        assert find_files((str(tmp_path / named),)) == shards


@pytest.mark.parametrize("target", ["/mnt/nothing/here", "disk", "a.jsonl/b"])
def test_a_broken_link_is_an_error_whatever_its_name(tmp_path, target):
    top = tmp_path / "in"
    add(top / "a.jsonl")
    add(top / "sub" / "b.jsonl")
    (top / "disk").symlink_to(target)
    for named in (top, f"{top}/*", f"{top}/**", f"{top}/**/*.jsonl", f"{top}/*/*.jsonl"):
        with pytest.raises(InputUnreadable, match=f"{top}/disk is a link to"):
            find_files((str(named),))
    # Paths that a pattern does not match are not examined.
    assert find_files((f"{top}/*.jsonl",)) == [f"{top}/a.jsonl"]
    assert find_files((f"{top}/s*/*.jsonl",)) == [f"{top}/sub/b.jsonl"]


def test_a_manifest_that_cannot_be_read_is_an_error(build_into, tmp_path):
    root = build_into(tmp_path / "in" / "prev")
    add(tmp_path / "in" / "a.jsonl")
    (root / "manifest.json").chmod(0)
    named = (tmp_path / "in", root, f"{tmp_path}/in/**/*.arrow")
    lines = run_as_nobody(tmp_path, "print(find_files((named,)))", *named)
    assert all(line.startswith(f"2 cannot read {root}/manifest.json") for line in lines), lines


def test_the_cache_is_not_read(tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("SFTPREP_CACHE", str(tmp_path / "in" / "cache"))
    first = add(tmp_path / "in" / "a.jsonl")
    add(tmp_path / "in" / "cache" / "tokenizers" / "b.json")
    for named in (str(tmp_path / "in"), f"{tmp_path}/in/**/*.json*", f"{tmp_path}/in/*"):
        caplog.clear()
        assert find_files((named,)) == [first]
        assert f"{tmp_path}/in/cache (the cache of sftprep)" in caplog.text


def test_a_broken_link_is_not_mistaken_for_a_data_set_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "y").symlink_to("nowhere")
    (tmp_path / "gone").symlink_to("nowhere")
    assert not is_hub_name("x/y")
    assert not is_hub_name("gone/y")
    assert is_hub_name("other/y")
    with pytest.raises(InputUnreadable, match="x/y is a link to a path that does not exist"):
        find_files(("x/y",))


def test_a_path_without_permission_is_not_mistaken_for_a_data_set_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    add(tmp_path / "x" / "y" / "a.jsonl")
    (tmp_path / "x").chmod(0)
    try:
        code = "print(is_hub_name(named), find_files((named,)))"
        lines = run_as_nobody(tmp_path, f"print(is_hub_name(named)); {code}", "x/y")
    finally:
        (tmp_path / "x").chmod(0o755)
    assert lines == ["False", "2 cannot read x/y: Permission denied"]


@pytest.mark.parametrize("named", ["in", "in/*", "in/**/*.jsonl"])
def test_a_name_that_is_not_utf8_is_an_error(tmp_path, named):
    add(tmp_path / "in" / "a.jsonl")
    Path(os.fsdecode(os.fsencode(tmp_path / "in") + b"/\xff.jsonl")).write_bytes(ROWS)
    with pytest.raises(InputUnreadable, match=r"\\xff\.jsonl has a name that is not UTF-8"):
        find_files((str(tmp_path / named),))


# --- spelling of paths -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        *("s4://b/x", "s3:/b/x", "s3:b/x", "gs:b", " s3://b/x", "\ts3:b", "s4://b/x ", "s3:"),
        *("simplecache::s3://b/x", "./s3://b/x", "s3_a://b/x", "://x", "data:text,abc", "host:/x"),
        *("C:\\data\\x", "C:/data/x", " C:\\x", "\\\\srv\\share\\x", "~nobody-of-this-name/x"),
        *("b\udcff", "a\0b"),
    ],
)
@pytest.mark.parametrize("setting", ["output", "cache"])
def test_outputs_that_are_not_local_paths_are_errors(
    records, tokenizer_dir, tmp_path, monkeypatch, path, setting
):
    rows = records([{"text": "a"}])
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    output = path
    if setting == "cache":
        if "\0" in path:
            pytest.skip("the system does not accept it")
        monkeypatch.setenv("SFTPREP_CACHE", path)
        output = "o"
    with pytest.raises(ConfigError, match=r"supported|no such user|UTF-8|NUL") as caught:
        build(rows, tokenizer=tokenizer_dir, output=output)
    assert caught.value.exit_code == 2
    assert os.listdir() == []


def test_the_remedy_suggests_a_path_that_is_accepted(records, tokenizer_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = records([{"text": "a"}])
    with pytest.raises(ConfigError) as caught:
        build(rows, tokenizer=tokenizer_dir, output="s3:/b/x")
    assert caught.value.remedy.endswith("write ./s3:/b/x")
    build(rows, tokenizer=tokenizer_dir, output="./s3:/b/x")
    assert (tmp_path / "s3:" / "b" / "x" / "manifest.json").exists()


def test_an_input_with_a_scheme_is_never_a_local_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    add(tmp_path / "s3:" / "b" / "a.jsonl")
    for url in ("s3://b/a.jsonl", "s3://b/*.jsonl", "s3://b", "./s3://b"):
        with pytest.raises(ConfigError, match="URLs are not supported"):
            find_files((url,))
    assert find_files(("s3:/b/*.jsonl",)) == [*find_files(("./s3:/b",))[:0], "s3:/b/a.jsonl"]


def test_a_tilde_is_expanded_to_the_home_of_a_user(records, tokenizer_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    rows = Path(records([{"text": "a"}]))
    (tmp_path / "home").mkdir()
    rows.rename(tmp_path / "home" / "a.jsonl")
    settings = f"inputs: ['~/a.jsonl']\noutput: ~/o\ntokenizer: {tokenizer_dir}\n"
    (tmp_path / "home" / "c.yaml").write_text(settings)
    command = [sys.executable, "-m", "sftprep", "build", "--config", "~/c.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    build("~/a.jsonl", tokenizer=tokenizer_dir, output="~/p", eval_fraction=0)
    assert {"o", "p"} <= set(os.listdir(tmp_path / "home"))
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize(
    ("settings", "code"),
    [
        ({"output": "a\0b"}, 2),
        ({"inputs": ["in\0x"]}, 2),
        ({"sources": [{"path": "in\0x"}]}, 2),
        ({"eval_input": "in\0x"}, 2),
        ({"output": "x" * 300}, 3),
        ({"inputs": ["x" * 300 + ".jsonl"]}, 2),
    ],
)
def test_names_that_no_system_accepts_are_errors_without_a_traceback(
    records, tokenizer_dir, tmp_path, settings, code
):
    named = {} if "sources" in settings else {"inputs": [str(records([{"text": "a"}]))]}
    settings = {**named, "output": "o", "tokenizer": str(tokenizer_dir), **settings}
    (tmp_path / "c.yaml").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "sftprep", "build", "--config", str(tmp_path / "c.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert "error: " in done.stderr


@pytest.mark.parametrize("setting", ["--tokenizer", "--config"])
def test_the_home_of_an_unknown_user_is_an_error_without_a_traceback(
    records, tokenizer_dir, tmp_path, setting
):
    path = "~nobody-of-this-name/x"
    settings = {"--tokenizer": tokenizer_dir, "--output": tmp_path / "o", setting: path}
    named = [part for pair in settings.items() for part in pair]
    command = [sys.executable, "-m", "sftprep", "build", records([{"text": "a"}]), *map(str, named)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert path in done.stderr


def test_an_output_without_permission_is_an_error_of_the_environment(tmp_path):
    (tmp_path / "locked").mkdir(mode=0)
    code = "claim_output(Path(named), overwrite=False).__enter__()"
    try:
        lines = run_as_nobody(tmp_path, code, tmp_path / "locked" / "o", tmp_path / "locked")
    finally:
        (tmp_path / "locked").chmod(0o755)
    assert len(lines) == 2
    assert all(line.startswith("3 cannot write") for line in lines), lines


def test_a_pattern_without_a_match_is_an_error(tmp_path):
    (tmp_path / "empty").mkdir()
    for pattern in ("*", "**", "none*.jsonl"):
        with pytest.raises(InputNotFound):
            find_files((f"{tmp_path}/{pattern}",))


def names_found(*inputs: object) -> list[str]:
    return sorted(Path(file).name for file in find_files(tuple(map(str, inputs))))


@pytest.mark.parametrize("literal", ["*.jsonl", "?.jsonl", "a*", "**", "*", "?.json?"])
def test_a_file_named_like_a_pattern_does_not_hide_the_other_files(tmp_path, literal):
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text('{"text": "a"}\n')
    others = sorted(name for name in os.listdir(tmp_path) if fnmatchcase(name, literal))
    if literal.endswith("jsonl"):
        (tmp_path / literal).write_text('{"text": "a"}\n')
        assert names_found(tmp_path / literal) == sorted([literal, *others])
        (tmp_path / literal).unlink()
    (tmp_path / literal).mkdir()
    (tmp_path / literal / "z.jsonl").write_text('{"text": "a"}\n')
    assert names_found(tmp_path / literal) == [*others, "z.jsonl"]


@pytest.mark.parametrize("literal", ["a[1].jsonl", "[ab].jsonl", "a[1]", "[a-b]*.jsonl"])
def test_a_name_with_brackets_is_refused_only_where_it_also_matches_others(tmp_path, literal):
    (tmp_path / literal).write_text('{"text": "a"}\n')
    path = tmp_path / literal
    if path.suffix:
        assert names_found(path) == [literal]
    (tmp_path / literal.replace("[1]", "1").replace("[ab]", "a").replace("[a-b]*", "ab")).touch()
    with pytest.raises(ConfigError, match="as a pattern it matches") as caught:
        find_files((str(path),))
    escaped = caught.value.remedy.split()[1]
    if path.suffix:
        assert names_found(escaped) == [literal]
