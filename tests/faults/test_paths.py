"""A build changes no file of a user and reads every record once, whatever the folders contain.

Random folder trees contain files with the names that builds use, links, other builds (finished and
killed), inputs around outputs and outputs around inputs. A build may refuse to start. It may not
change anything that it did not create, nor omit or repeat a record.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sftprep import build, open_shards, read_manifest, verify
from sftprep.errors import (
    ConfigError,
    FormatError,
    InputNotFound,
    InputUnreadable,
    OutputExists,
    SftprepError,
    StorageError,
)
from sftprep.sources.discovery.files import find_files
from tests.faults.test_crash import killed_before
from tests.support import thorough

ROWS = "".join(json.dumps({"text": f"record {k}"}) + "\n" for k in range(3)).encode()
REFUSALS = (OutputExists, ConfigError, FormatError, InputNotFound, InputUnreadable, StorageError)

FOLDERS = ["", "in", "in/sub", "in/.hidden", "out", "out/sub", "out/shards", "out/eval"]
FOLDERS += ["out/eval/shards", "out/spill", "out/spill/shards", "in/out", "in/out/shards", "other"]
NAMES = ["a.jsonl", "b.jsonl", "notes.txt", "manifest.json", "rejected.jsonl", "build.json"]
NAMES += ["lock", ".lock", "commit.json", ".a.jsonl.123.tmp", "recipe-0123456789abcdef.jsonl"]
NAMES += [f"{'0' * 40}.arrow", "shard-00000-0123456789abcdef.arrow", "README.md", "state.json"]
NAMES += ["spill", "shards", "eval"]
NO_DATA = {"manifest.json", "state.json"}
LINKS = ["../a.jsonl", "a.jsonl", "../other", "../out", "../in", ".", "nowhere.jsonl", "../nowhere"]

entries = st.lists(
    st.tuples(
        st.sampled_from(FOLDERS),
        st.sampled_from(NAMES),
        st.one_of(
            st.sampled_from(["records", "empty", "garbage", "folder"]),
            st.sampled_from(LINKS).map(lambda target: f"link {target}"),
        ),
    ),
    max_size=8,
)
actions = st.lists(
    st.tuples(
        st.sampled_from(["out", "in/out", "in", "out/eval", "out/sub", "other"]),
        st.sampled_from(["in", "out", "in/a.jsonl", "**/*.jsonl", "*/*.jsonl", "in/**"]),
        st.booleans(),  # --overwrite
        st.sampled_from([0.0, 0.4]),  # share held out for evaluation
        st.sampled_from([None, None, 5, 12, 25]),  # killed before this change
    ),
    min_size=1,
    max_size=4,
)


def snapshot(root: Path) -> dict[str, object]:
    """Return every path below a folder, with the target of a link, the content of a file, or None
    for a folder."""
    found: dict[str, object] = {}
    for folder, folders, files in os.walk(root):
        for name in [*folders, *files]:
            path = Path(folder, name)
            key = str(path.relative_to(root))
            if path.is_symlink():
                found[key] = f"-> {os.readlink(path)}"
            else:
                found[key] = path.read_bytes() if path.is_file() else None
    return found


def plant(root: Path, tree: list[tuple[str, str, str]]) -> None:
    """Add files of a user, at paths that do not exist yet."""
    for number, (folder, name, what) in enumerate(tree):
        path = root / folder / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if os.path.lexists(path):
                continue
            if what == "folder":
                path.mkdir()
            elif what.startswith("link"):
                path.symlink_to(what.removeprefix("link "))
            else:
                rows = b"".join(
                    json.dumps({"text": f"{folder}/{name} {number} {k}"}).encode() + b"\n"
                    for k in range(3)
                )
                path.write_bytes({"records": rows, "empty": b"", "garbage": b"\0\1{"}[what])
        except (FileExistsError, NotADirectoryError):
            continue


def is_ours(folder: Path) -> bool:
    """Whether a folder contains a build, decided without the code of sftprep."""
    try:
        return "sftprep_version" in json.loads((folder / "manifest.json").read_bytes())
    except (OSError, ValueError, TypeError):
        return (folder / "spill" / "build.json").is_file() and (
            b"unfinished" in (folder / "spill" / "build.json").read_bytes()
        )


def texts_of(files: set[Path]) -> list[str]:
    found = []
    for file in files:
        for line in file.read_bytes().splitlines():
            found.append(json.loads(line)["text"])
    return sorted(found)


def real(path: Path) -> Path:
    """Resolve a path; a link to itself is returned unchanged."""
    return Path(os.path.realpath(path))


def wanted_files(root: Path, named: str, output: Path) -> set[Path] | None:
    """Return the resolved files that an input means; None for a pattern, which is checked less."""
    if "*" in named:
        return None
    top, found = root / named, set()
    if top.is_file():
        return {real(top)}
    waiting = [top]
    while waiting:
        folder = waiting.pop()
        for path in folder.iterdir():
            if path.name.startswith("."):
                continue
            if path.is_dir():
                if path.is_symlink() or real(path) == real(output) or is_ours(path):
                    continue
                waiting.append(path)
            elif path.suffix not in (".jsonl", ".json", ".arrow") or path.name in NO_DATA:
                continue
            elif real(output) not in real(path).parents:
                found.add(real(path))
    return found


@settings(
    max_examples=thorough(150, default=50),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(before=entries, actions=actions, between=entries)
def test_builds_in_random_trees_change_no_user_file_and_read_every_record_once(
    tmp_path_factory, tokenizer_dir, before, actions, between
):
    root = tmp_path_factory.mktemp("tree")
    logging.disable(logging.WARNING)
    try:
        for name in ("in", "in/sub"):
            (root / name).mkdir()
            (root / name / "a.jsonl").write_bytes(ROWS.replace(b"record", f"{name}".encode()))
        plant(root, before)
        ours: set[str] = set()
        for number, (output, named, overwrite, held_out, kill) in enumerate(actions):
            if number == 1:
                plant(root, between)
            users = {path: what for path, what in snapshot(root).items() if path not in ours}
            files = (
                None if not (root / named).exists() else wanted_files(root, named, root / output)
            )
            options = {"overwrite": overwrite, "eval_fraction": held_out, "max_length": 64}
            options["encoder"] = "tokenizers"  # the only one that needs no process of its own
            finished = attempt(root, named, output, tokenizer_dir, options, kill)
            after = snapshot(root)
            assert users.items() <= after.items(), "a file of the user was changed or removed"
            ours = set(after) - set(users)
            outside = {path for path in ours - {output} if not path.startswith(f"{output}/")}
            assert not {
                p for p in outside if p not in after or f"{p}/" not in f"{output}/"
            } - previous(ours, output), "something was written outside of the output folder"
            if finished:
                check_records(root / output, files)
    finally:
        logging.disable(logging.NOTSET)
        shutil.rmtree(root)


def previous(ours: set[str], output: str) -> set[str]:
    """Return the paths of earlier builds of this test."""
    return {path for path in ours if not path.startswith(f"{output}/")}


def attempt(root, named, output, tokenizer, options, kill) -> bool:
    """Run a build, and return whether it finished.

    Args:
        kill: The number of the change to the output folder before which it is killed, or None.
    """

    def run() -> None:
        try:
            build(str(root / named), tokenizer=tokenizer, output=root / output, **options)
        except REFUSALS:
            refused.append(1)
        except SftprepError as error:
            refused.append(error.exit_code)
            # Garbage among the inputs, or nothing left to train on.
            if error.exit_code != 2:
                raise

    refused: list[int] = []
    if kill is not None:
        killed_before(kill, root / output, run)
        return False
    run()
    return not refused


def check_records(output: Path, files: set[Path] | None) -> None:
    """Check that every record of the inputs is in the build exactly once."""
    manifest = read_manifest(output)
    parts = [output, *([output / "eval"] if manifest.eval else [])]
    assert all(verify(part).ok for part in parts)
    read = [Path(info.path).resolve() for info in manifest.inputs]
    assert len(read) == len(set(read))
    if files is not None:
        assert set(read) == files
    lines = sorted(
        manifest.locate(int(origin)) for part in parts for pack in open_shards(part)
        for origin in pack.origin
    )  # fmt: skip
    assert lines == sorted(
        (info.path, number + 1) for info in manifest.inputs for number in range(info.lines)
    )


def test_a_build_in_a_subfolder_is_not_removed(records, tokenizer_dir, tmp_path):
    path = records([{"text": "a b c"}])
    build(path, tokenizer=tokenizer_dir, output=tmp_path / "data" / "eval")
    before = snapshot(tmp_path / "data")
    for overwrite in (False, True):
        with pytest.raises(OutputExists, match=r"eval/manifest\.json"):
            build(path, tokenizer=tokenizer_dir, output=tmp_path / "data", overwrite=overwrite)
    assert snapshot(tmp_path / "data") == before


def test_a_separate_build_in_the_eval_folder_of_a_finished_build_is_not_removed(
    records, tokenizer_dir, tmp_path
):
    path = records([{"text": f"a {k}"} for k in range(20)])
    build(path, tokenizer=tokenizer_dir, output=tmp_path / "data", eval_fraction=0.3)
    other = records([{"text": "other"}], "other.jsonl")
    build(other, tokenizer=tokenizer_dir, output=tmp_path / "other")
    shutil.rmtree(tmp_path / "data" / "eval")
    (tmp_path / "other").rename(tmp_path / "data" / "eval")
    before = snapshot(tmp_path / "data")
    with pytest.raises(OutputExists, match=r"eval/manifest\.json"):
        build(path, tokenizer=tokenizer_dir, output=tmp_path / "data", overwrite=True)
    assert snapshot(tmp_path / "data") == before


@pytest.mark.parametrize("folder", ["shards", "eval", "spill", "eval/shards"])
@pytest.mark.parametrize("finished", [False, True])
def test_files_in_folders_with_our_names_are_kept(
    records, tokenizer_dir, tmp_path, folder, finished
):
    path, output = records([{"text": "a b c"}]), tmp_path / "o"
    if finished:
        build(path, tokenizer=tokenizer_dir, output=output)
    (output / folder).mkdir(parents=True, exist_ok=True)
    (output / folder / "precious.txt").write_text("mine")
    with pytest.raises(OutputExists, match=rf"{folder}/precious\.txt"):
        build(path, tokenizer=tokenizer_dir, output=output, overwrite=True, seed=1)
    assert (output / folder / "precious.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "name", ["manifest.json", "rejected.jsonl", "shards", "spill", "eval", "spill/lock"]
)
def test_links_with_our_names_are_not_followed(records, tokenizer_dir, tmp_path, name):
    target = tmp_path / "target"
    target.mkdir()
    (target / "file").write_text("precious")
    link = tmp_path / "o" / name
    link.parent.mkdir(parents=True)
    link.symlink_to(target if name in ("shards", "spill", "eval") else target / "file")
    with pytest.raises(OutputExists, match=name):
        build(records([{"text": "a b"}]), tokenizer=tokenizer_dir, output=tmp_path / "o")
    assert snapshot(target) == {"file": b"precious"}
    assert link.is_symlink()


def test_hidden_files_in_the_output_folder_are_kept(records, tokenizer_dir, tmp_path):
    output = tmp_path / "o"
    (output / ".git").mkdir(parents=True)
    for name in (".git/config", ".lock", ".old.tmp", ".git/.index.tmp"):
        (output / name).write_text("mine")
    before = snapshot(output)
    for _ in range(2):
        build(records([{"text": "a b"}]), tokenizer=tokenizer_dir, output=output, overwrite=True)
        assert before.items() <= snapshot(output).items()


def test_a_damaged_manifest_names_nothing_so_nothing_is_removed(records, tokenizer_dir, tmp_path):
    path, output = records([{"text": "a b"}]), tmp_path / "o"
    build(path, tokenizer=tokenizer_dir, output=output)
    (output / "manifest.json").write_text("{")
    before = snapshot(output)
    with pytest.raises(OutputExists, match=r"manifest\.json.*is damaged"):
        build(path, tokenizer=tokenizer_dir, output=output, overwrite=True)
    assert snapshot(output) == before


def test_a_build_that_fails_before_it_works_leaves_no_folder(records, tokenizer_dir, tmp_path):
    path = records([{"text": 1}])
    with pytest.raises(SftprepError):
        build(path, tokenizer=tokenizer_dir, output=tmp_path / "o" / "p", map="nothing=x")
    with pytest.raises(ConfigError):
        build(path, tokenizer=tokenizer_dir, output="s3:/bucket/o")
    assert not Path("s3:").exists()


def test_a_failed_build_leaves_the_rejected_records_of_the_one_before(
    records, tokenizer_dir, tmp_path
):
    output, settings_ = tmp_path / "o", {"on_bad_record": "quarantine", "overwrite": True}
    one_bad = records([{"text": "a"}, {"text": 1}, {"text": "b"}], "one.jsonl")
    build(one_bad, tokenizer=tokenizer_dir, output=output, max_rejected="50%", **settings_)
    before = snapshot(output)
    many_bad = records([{"text": "a"}, {"text": 1}, {"text": 2}], "many.jsonl")
    with pytest.raises(SftprepError, match="2 of 3 records were rejected") as caught:
        build(many_bad, tokenizer=tokenizer_dir, output=output, **settings_)
    assert before.items() <= snapshot(output).items()
    (path,) = (output / "spill").glob("rejected-*.jsonl")
    named = str(path)
    assert named in caught.value.remedy
    assert len(Path(named).read_text().splitlines()) == 2
    build(records([{"text": "a"}]), tokenizer=tokenizer_dir, output=output, **settings_)
    assert sorted(p.name for p in output.iterdir()) == [
        "README.md",
        "groups",
        "manifest.json",
        "shards",
    ]


# --- reading inputs ----------------------------------------------------------------------------


def test_the_output_below_the_input_is_not_read(records, tokenizer_dir, tmp_path, caplog):
    source = tmp_path / "in"
    source.mkdir()
    (source / "a.jsonl").write_bytes(ROWS)
    for _ in range(2):
        report = build(source, tokenizer=tokenizer_dir, output=source / "packed", overwrite=True)
        assert report.manifest.accounting.records == 3
    # Another build with the same input, and one that was killed, are not read either.
    killed = source / "killed"
    killing = lambda: build(source, tokenizer=tokenizer_dir, output=killed) and None  # noqa: E731
    assert killed_before(20, killed, killing)
    assert list((killed / "spill").glob("*.arrow"))
    caplog.clear()
    report = build(source, tokenizer=tokenizer_dir, output=tmp_path / "elsewhere")
    assert report.manifest.accounting.records == 3
    assert f"{source}/packed" in caplog.text
    assert f"{source}/killed" in caplog.text
    for pattern in (f"{source}/**/*.*", f"{source}/*/*.*", f"{source}/*.jsonl"):
        if pattern != f"{source}/*/*.*":
            assert find_files((pattern,), output=str(source / "new")) == [str(source / "a.jsonl")]
        else:
            with pytest.raises(InputNotFound):
                find_files((pattern,))
    # Named, shards are records of tokens.
    (shard,) = find_files((f"{source}/packed/shards/*/*.arrow",))
    assert find_files((f"{source}/*/shards/*/*.arrow",)) == [shard]
    assert find_files((str(source / "packed" / "shards"),)) == [shard]


def test_an_input_in_the_output_folder_is_refused(tokenizer_dir, tmp_path):
    (tmp_path / "o" / "sub").mkdir(parents=True)
    (tmp_path / "o" / "sub" / "a.jsonl").write_bytes(ROWS)
    for named in ("o/sub", "o/sub/a.jsonl", "o/*/a.jsonl", "o/sub/*"):
        with pytest.raises((ConfigError, InputNotFound), match=r"output folder|matches no file"):
            build(tmp_path / named, tokenizer=tokenizer_dir, output=tmp_path / "o")
    (tmp_path / "link.jsonl").symlink_to("o/sub/a.jsonl")
    with pytest.raises(ConfigError, match="is in the output folder"):
        build(tmp_path / "link.jsonl", tokenizer=tokenizer_dir, output=tmp_path / "o")
    assert sorted(os.listdir(tmp_path / "o")) == ["sub"]


def test_links_in_a_folder_are_read_once_and_links_to_folders_are_not_followed(tmp_path, caplog):
    folder, outside = tmp_path / "in", tmp_path / "outside"
    (folder / "sub").mkdir(parents=True)
    outside.mkdir()
    (folder / "sub" / "a.jsonl").write_bytes(ROWS)
    (outside / "b.jsonl").write_bytes(ROWS)
    (folder / "again.jsonl").symlink_to("sub/a.jsonl")
    (folder / "b.jsonl").symlink_to("../outside/b.jsonl")
    (folder / "loop").symlink_to(".")
    (folder / "more").symlink_to("../outside")
    found = find_files((str(folder),))
    assert found == [str(folder / "b.jsonl"), str(folder / "sub" / "a.jsonl")]
    assert f"not read: {folder}/more (links to folders" in caplog.text
    assert f"not read: {folder}/again.jsonl (links to files that are read already)" in caplog.text
    assert "loop" not in caplog.text
    assert find_files((f"{folder}/**/*.jsonl",)) == found
    (folder / "gone.jsonl").symlink_to("nowhere")
    with pytest.raises(InputUnreadable, match=r"gone\.jsonl is a link to a path that does not"):
        find_files((str(folder),))


def test_skipped_files_in_a_folder_are_logged_once(tmp_path, caplog):
    for name in ("a.jsonl", "wiki.txt", "notes.md", "README.md", "LICENSE", ".hidden"):
        (tmp_path / name).write_bytes(ROWS)
    assert find_files((str(tmp_path),)) == [str(tmp_path / "a.jsonl")]
    assert [record.getMessage() for record in caplog.records] == [
        f"not read: {tmp_path}/notes.md, {tmp_path}/wiki.txt (not a kind that is read, except with"
        " the format text)"
    ]


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    for named in (str(tmp_path), str(tmp_path / "pipe.jsonl"), f"{tmp_path}/*.jsonl"):
        with pytest.raises(InputUnreadable, match=r"pipe\.jsonl is a pipe, a socket or a device"):
            find_files((named,))


def test_a_folder_that_may_not_be_listed_is_an_error(tmp_path):
    """The search runs as another user, because root may list every folder."""
    secret = tmp_path / "in" / "secret"
    secret.mkdir(parents=True)
    for folder in (tmp_path / "in", secret):
        (folder / "a.jsonl").write_bytes(ROWS)
    secret.chmod(0)
    code = (
        "import os, sys\n"
        "from sftprep.sources.discovery.files import find_files\n"
        "from sftprep.errors import InputUnreadable\n"
        "if os.getuid() == 0: os.setgid(65534); os.setuid(65534)\n"
        "for named in sys.argv[1:]:\n"
        "    try: print(find_files((named,)))\n"
        "    except InputUnreadable as error: print(error.message)\n"
    )
    names = [str(tmp_path / "in"), f"{tmp_path}/in/**/*.jsonl", f"{tmp_path}/in/*/a.jsonl"]
    try:
        for folder in (tmp_path, *tmp_path.parents):
            if "pytest" in str(folder):  # only its owner may enter these
                folder.chmod(stat.S_IMODE(folder.stat().st_mode) | 0o055)
        done = subprocess.run(
            [sys.executable, "-c", code, *names], capture_output=True, text=True, check=False
        )
    finally:
        secret.chmod(0o755)
    assert done.stdout.splitlines() == [f"cannot read {secret}: Permission denied"] * 3, done.stderr


def test_a_saved_data_set_that_names_a_split_elsewhere_is_refused(tmp_path):
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "a.jsonl").write_bytes(ROWS)
    (tmp_path / "in").mkdir()
    for splits in ('{"splits": ["../private"]}', '{"splits": 3}', "{}", "[", '{"splits": [".."]}'):
        (tmp_path / "in" / "dataset_dict.json").write_text(splits)
        with pytest.raises(InputUnreadable, match=r"dataset_dict\.json"):
            find_files((str(tmp_path / "in"),))


@pytest.mark.parametrize("url", ["s4://b/x", "file:///tmp/x.jsonl", "s3a+b://h/x.jsonl"])
def test_urls_of_other_protocols_are_refused_and_nothing_is_written(
    records, tokenizer_dir, tmp_path, monkeypatch, url
):
    monkeypatch.chdir(tmp_path)
    path = records([{"text": "a"}])
    before = snapshot(tmp_path)
    for output in (url, Path(url), url.upper()):
        with pytest.raises(ConfigError, match="not supported"):
            build(path, tokenizer=tokenizer_dir, output=output)
    for settings_ in ({}, {"eval_input": url}):
        with pytest.raises(ConfigError, match="not supported"):
            build(path if settings_ else url, tokenizer=tokenizer_dir, output="o", **settings_)
    assert snapshot(tmp_path) == before
