"""Records in the shapes of public data sets: what is shown, what is trained, what is named."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sftprep import build
from sftprep.errors import FlagNames, FormatError, SftprepError, TemplateError
from tests.semantics.conftest import CHATML
from tests.semantics.prepared import Prepared, prepare
from tests.support import SHARED, needs_shared, rejected_file

CASES = SHARED.parent / "cases"
QWEN3 = SHARED / "tokenizers" / "qwen3"
USER = {"role": "user", "content": "Name a lighthouse."}
ASSISTANT = {"role": "assistant", "content": "Roter Sand."}
SUGGESTS = "name suggests content or a switch of training"
CHAT = [USER, ASSISTANT]


def lines_of(name: str) -> list[Any]:
    (path,) = (CASES / "data").glob(f"{name}-*.json*")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def chatml(*turns: tuple[str, str]) -> str:
    return "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns)


def shown(rows: list[Any], folder: Path, **settings: Any) -> str:
    """Return the text of the only sequence."""
    made = prepare(rows, folder, **settings)
    assert made.batch.rejected == []
    assert len(made) == len(rows)
    return made.text()


@pytest.fixture
def chatml_dir(folder_with: Any) -> Path:
    return folder_with(CHATML)


@pytest.fixture
def qwen3(folder_with: Any) -> Path:
    """The template of Qwen3 with a small tokenizer, since the real one takes half a second to load.

    Real tokenizers are tested in test_special.py, test_tools.py and test_turns.py.
    """
    return folder_with((QWEN3 / "chat_template.jinja").read_text(encoding="utf-8"))


@pytest.fixture
def built(tokenizer_dir: Path, records: Any, tmp_path: Path, capsys: Any, caplog: Any) -> Any:
    """Run the command on records, and return its exit code and its output with its log."""
    from sftprep.cli import main

    def run(rows: list[Any] | str, *flags: str) -> tuple[int, str]:
        path = rows if isinstance(rows, str) else records(rows)
        command = ["build", path, "--tokenizer", str(tokenizer_dir)]
        command += ["--output", str(tmp_path / "o"), "--overwrite", "--workers", "1", *flags]
        with pytest.raises(SystemExit) as ended:
            main(command)
        out, err = capsys.readouterr()
        logged = caplog.text
        caplog.clear()
        return int(ended.value.code or 0), out + err + logged

    return run


# --- the shapes of public data sets ---------------------------------------------------------------


def shapes() -> list[Any]:
    path = CASES / "shapes.jsonl"
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def split_by_mask(made: Prepared) -> tuple[str, str]:
    trained = "|".join(run for k in range(len(made)) for run in made.trained(k))
    return "|".join(made.text(k) for k in range(len(made))), trained


NEED_A_FLAG = {
    "UltraChat original (data: list of str)": "--map data=messages",
    "OASST tree": "--transform ",
    "MOSS chat dict": "--transform ",
    "hh-rlhf": "--transform ",
    "ShareGPT empty conversations": "--on-bad-record quarantine",
}


@needs_shared
@pytest.mark.parametrize("shape", shapes(), ids=lambda shape: shape["shape"])
def test_a_public_shape_is_read_or_the_error_names_the_flag(
    shape: Any, records: Any, tmp_path: Path, qwen3: Path
) -> None:
    path = records(shape["records"])
    settings = {"tokenizer": str(qwen3), "output": tmp_path / "o", "workers": 1}
    if shape["shape"] in NEED_A_FLAG:
        with pytest.raises(SftprepError) as caught:
            build(path, **settings)
        text = str(caught.value.shown_by(FlagNames()))
        assert f"try: {NEED_A_FLAG[shape['shape']]}" in text
        return
    build(path, **settings)
    rows = [row if isinstance(row, dict) else {"messages": row} for row in shape["records"]]
    whole, trained = split_by_mask(prepare(rows, qwen3))
    at = 0
    for string in shape["shown"]:
        assert string in whole[at:]
        at = whole.find(string, at) + 1
    assert all(string in trained for string in shape["trained"])
    assert not any(string in trained for string in shape.get("untrained", ()))
    assert "<|im_start|>" in whole or not shape.get("chat")


# --- roles, turns and contents --------------------------------------------------------------------


@pytest.mark.parametrize(
    "turns",
    [
        [{"role": "human", "content": "a"}, {"role": "gpt", "content": "b"}],
        [{"role": "User", "content": "a"}, {"role": " Assistant ", "content": "b"}],
        [{"from": "Human", "value": "a"}, {"from": "bot", "value": "b"}],
        [{"role": "user", "parts": [{"text": "a"}]}, {"role": "model", "parts": [{"text": "b"}]}],
        [{"role": "prompter", "text": "a"}, {"role": "assistant", "text": "b"}],
        [{"input": "a", "output": "b"}],
        [["a", "b"]],
        [{"user": "a"}, {"assistant": "b"}],
        [{"type": "human", "content": "a"}, {"type": "ai", "content": "b"}],
        ["a", "b"],
        json.dumps([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]),
        [
            {"role": "user", "content": [{"type": "input_text", "text": "a"}]},
            {"role": "assistant", "content": ["b"]},
        ],
    ],
)
@pytest.mark.parametrize("key", ["messages", "conversations", "conversation", "dialog"])
def test_every_layout_of_turns_is_read_under_every_key(
    chatml_dir: Path, key: str, turns: Any
) -> None:
    assert shown([{key: turns}], chatml_dir) == chatml(("user", "a"), ("assistant", "b"))


def test_roles_that_the_template_does_not_show_become_tool(folder_with: Any) -> None:
    row = {"messages": [*CHAT, {"role": "ipython", "content": "9"}]}
    template = CHATML.replace("{{ '<|im", "{% if message.role != 'ipython' %}{{ '<|im", 1)
    template = template.replace("{% endfor %}", "{% endif %}{% endfor %}")
    assert "<|im_start|>ipython\n9" in shown([row], folder_with(CHATML))
    assert "<|im_start|>tool\n9" in shown([row], folder_with(template))


def test_a_developer_is_never_renamed(chatml_dir: Path) -> None:
    row = {"messages": [{"role": "developer", "content": "d"}, *CHAT]}
    assert shown([row], chatml_dir).startswith("<|im_start|>developer\nd")


@needs_shared
def test_parts_of_tools_become_calls_and_results(qwen3: Path) -> None:
    row = {
        "messages": [
            USER,
            {
                "role": "assistant",
                "content": [
                    {"type": "text", "text": "Look."},
                    {"type": "tool_use", "id": "t1", "name": "chart", "input": {"of": "Elbe"}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "t1", "content": [{"text": "9 m"}]},
                    {"type": "text", "text": "So?"},
                ],
            },
            ASSISTANT,
        ]
    }
    text = shown([row], qwen3)
    assert 'Look.\n<tool_call>\n{"name": "chart", "arguments": {"of": "Elbe"}}' in text
    assert "<tool_response>\n9 m\n</tool_response>" in text
    assert text.index("9 m") < text.index("So?")


def test_reasoning_that_the_template_does_not_show_is_counted_in_every_form(
    chatml_dir: Path,
) -> None:
    for answer in (
        {"content": "So.", "reasoning_content": "Hm."},
        {"content": [{"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": "So."}]},
    ):
        made = prepare([{"messages": [USER, {"role": "assistant", **answer}]}], chatml_dir)
        assert made.text() == chatml(("user", USER["content"]), ("assistant", "So."))
        assert made.batch.counts["warnings.reasoning_not_shown"] == 1


def test_a_template_that_iterates_over_parts_receives_parts(folder_with: Any) -> None:
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% for part in m.content %}"
        "{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{{ '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    made = prepare([{"messages": CHAT}], folder_with(template), train_on="assistant")
    assert made.text() == chatml(("user", USER["content"]), ("assistant", ASSISTANT["content"]))
    assert made.trained() == ["Roter Sand.<|im_end|>"]


@needs_shared
@pytest.mark.parametrize("name", ["smolvlm", "idefics3", "llava_next"])
def test_templates_of_vision_models_show_text(name: str, qwen3: Path) -> None:
    template = SHARED / "tokenizers" / "_chat_templates_trl_1.16.0" / f"{name}.jinja"
    made = prepare(lines_of("16"), qwen3, chat_template=str(template), train_on="assistant")
    assert "Name a lighthouse." in made.text()
    assert "Roter Sand." in made.trained()[0]


# --- empty and null -------------------------------------------------------------------------------


@needs_shared
@pytest.mark.parametrize("tokenizer", ["qwen3", "deepseek-v4", "smollm2", "mistral-v3"])
def test_an_empty_list_of_calls_means_no_calls(tokenizer: str, folder_with: Any) -> None:
    rows = lines_of("03")
    plain = json.loads(json.dumps(rows).replace(', "tool_calls": []', ""))
    template = SHARED / "tokenizers" / tokenizer / "chat_template.jinja"
    folder = folder_with(template.read_text(encoding="utf-8"))
    made = prepare(rows, folder)
    assert made.batch.rejected == []
    expected = prepare(plain, folder).batch
    assert made.batch.input_ids.tolist() == expected.input_ids.tolist()
    assert "warnings.tool_calls_not_shown" not in made.batch.counts


@pytest.mark.parametrize("tools", [[], "[]", "null", "", " ", {}, None])
def test_empty_tools_are_absent(chatml_dir: Path, tools: Any) -> None:
    made = prepare([{"messages": CHAT, "tools": tools, "functions": tools}], chatml_dir)
    assert made.text() == prepare([{"messages": CHAT}], chatml_dir).text()
    assert "warnings.tools_not_shown" not in made.batch.counts


@needs_shared
def test_a_null_switch_is_absent(qwen3: Path) -> None:
    made = prepare(lines_of("19"), qwen3)
    assert [len(made.trained(k)) for k in range(3)] == [1, 1, 1]
    assert made.trained(0)[0].startswith("im_start|>user\n") or "<|im_start|>" in made.text(0)
    assert made.trained(0) == made.trained(1)


@needs_shared
def test_a_null_key_of_another_layout_is_absent(qwen3: Path) -> None:
    for rows in (lines_of("28"), lines_of("28")[::-1]):
        made = prepare(rows, qwen3)
        assert made.batch.rejected == []
        assert "Husum." in made.text(0) + made.text(1)
        assert "Roter Sand." in made.text(0) + made.text(1)


def test_nulls_of_a_table_of_tools_lead_to_a_warning(
    tmp_path: Path, tokenizer_dir: Path, caplog: Any
) -> None:
    calls = [
        {"function": {"name": n, "arguments": a}} for n, a in (("f", {"x": "1"}), ("g", {"y": "2"}))
    ]
    rows = [
        {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [call]}]}
        for call in calls
    ]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    settings = {"tokenizer": tokenizer_dir, "overwrite": True}
    build(path, output=tmp_path / "o", **settings)
    assert "strip_nulls=True" in caplog.text
    caplog.clear()
    build(path, output=tmp_path / "o", strip_nulls=True, **settings)
    build(rows, output=tmp_path / "o", **settings)  # nulls that the user wrote
    assert "strip_nulls" not in caplog.text


# --- keys with a known meaning --------------------------------------------------------------------


@pytest.mark.parametrize(
    "system",
    [
        {"system": "S"},
        {"system_prompt": "S"},
        {"systemInstruction": {"parts": [{"text": "S"}]}},
        {"system": [{"type": "text", "text": "S"}]},
    ],
)
def test_a_system_prompt_alongside_messages_is_the_first_message(
    chatml_dir: Path, system: dict[str, Any]
) -> None:
    expected = [("system", "S"), ("user", USER["content"]), ("assistant", ASSISTANT["content"])]
    for row in ({"messages": CHAT}, {"prompt": CHAT[:1], "completion": CHAT[1:]}):
        assert shown([{**row, **system}], chatml_dir) == chatml(*expected)


def test_a_system_prompt_that_is_not_used_is_named(built: Any) -> None:
    row = {"messages": [{"role": "system", "content": "S"}, *CHAT], "system": "Another one."}
    code, output = built([row])
    assert code == 0
    assert f"the column 'system' is not read, although its {SUGGESTS} (1 record, " in output


@needs_shared
def test_calls_of_the_older_openai_format_are_shown(qwen3: Path) -> None:
    for row in lines_of("12"):
        made = prepare([row], qwen3)
        assert '<tool_call>\n{"name": "tide_table", "arguments": {"harbour":' in made.text()
        assert "<tool_response>\nhigh water" in made.text()
        assert '"description": "High and low water for a harbour"' in made.text()


@needs_shared
def test_an_answer_alongside_messages_is_the_turn_of_the_assistant(qwen3: Path) -> None:
    made = prepare(lines_of("15"), qwen3, train_on="assistant")
    assert made.trained(0) == ["<think>\n91 is 7 times 13.\n</think>\n\nNo.<|im_end|>"]


@needs_shared
def test_reasoning_alongside_an_answer_is_shown_unless_it_is_a_mode(qwen3: Path) -> None:
    for row in ({"question": "a", "answer": "b"}, {"messages": [USER], "answer": "b"}):
        assert "<think>\nhm, so\n</think>\n\nb" in shown([{**row, "reasoning": "hm, so"}], qwen3)
        assert "off" not in shown([{**row, "reasoning": "off"}], qwen3)


def test_an_answer_is_not_added_to_an_answered_conversation(chatml_dir: Path) -> None:
    text = shown([{"messages": CHAT, "answer": "Another."}], chatml_dir)
    assert text == chatml(("user", USER["content"]), ("assistant", ASSISTANT["content"]))


def test_prompts_without_any_answer_are_refused(built: Any) -> None:
    code, output = built([{"messages": [USER]}, {"messages": [USER, USER]}])
    assert code == 2
    assert "has a message of the assistant" in output
    assert "answer" in output.partition("→")[2]
    assert built([{"messages": [USER]}], "--quality-checks", "keep")[0] == 0


@needs_shared
def test_tools_of_plain_records_are_shown_and_their_calls_are_calls(qwen3: Path) -> None:
    for settings in ({}, {"map": "query=instruction,answers=output"}):
        made = prepare(lines_of("17"), qwen3, **settings)
        assert '<tools>\n{"name": "tide_table"' in made.text()
        assert '<tool_call>\n{"name": "tide_table", "arguments"' in made.trained()[0]


@needs_shared
def test_other_names_of_switches_are_read(qwen3: Path) -> None:
    rows = lines_of("20")
    for made in (
        prepare(rows[:3], qwen3),
        prepare(rows[:3], qwen3, train_on="assistant"),
        prepare(rows[3:], qwen3),
    ):
        for k in range(len(made)):
            (run,) = made.trained(k)
            assert run.endswith("Cast off.<|im_end|>")


@pytest.mark.parametrize("key", ["parameters", "args", "input"])
def test_the_arguments_of_calls_have_other_names(key: str) -> None:
    from sftprep.records.formats import read_record
    from sftprep.records.options import RecordOptions

    call = {"type": "function", "function": {"name": "f", key: {"x": 1}}}
    message = {"role": "assistant", "content": "", "tool_calls": [call]}
    example = read_record({"messages": [USER, message]}, 0, "messages", RecordOptions())
    assert example.messages is not None
    function = example.messages[1]["tool_calls"][0]["function"]
    assert function == {"name": "f", "arguments": {"x": 1}}


# --- requests and answers -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "request_text"),
    [
        ({"question": "a", "answer": "b"}, "a"),
        ({"instruction": "a", "context": "c", "response": "b"}, "a\nc"),
        ({"instruction": "a", "input": "", "response": "b"}, "a"),
        ({"inputs": "a", "targets": "b"}, "a"),
        ({"prompt": [{"role": "user", "content": "a"}], "completion": "b"}, "a"),
        ({"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}, "a"),
        ({"input": [{"role": "user", "content": "a"}], "output": "b"}, "a"),
        ({"message_1": "a", "message_2": "b"}, "a"),
    ],
)
def test_a_request_and_its_answer_are_turns(
    chatml_dir: Path, row: dict[str, Any], request_text: str
) -> None:
    made = prepare([row], chatml_dir)
    assert made.text() == chatml(("user", request_text), ("assistant", "b"))
    assert made.trained() == ["b<|im_end|>\n"]


def test_prompt_and_completion_strings_are_joined_unless_requested(
    chatml_dir: Path, built: Any
) -> None:
    row = {"prompt": "Name a lighthouse.", "completion": "Roter Sand."}
    assert shown([row], chatml_dir) == "Name a lighthouse.Roter Sand.<|im_end|>"
    assert shown([row], chatml_dir, as_chat=True) == chatml(
        ("user", "Name a lighthouse."), ("assistant", "Roter Sand.")
    )
    _, output = built([row])
    assert "'Name a lighthouse.Roter Sand.'" in output
    assert "try: --as-chat" in output
    assert "try: --as-chat" not in built([row], "--as-chat")[1]


def test_known_pairs_are_joined_without_a_template_or_on_request(chatml_dir: Path) -> None:
    row = {"question": "a", "answer": "b"}
    assert shown([row], chatml_dir, as_chat=False) == "ab<|im_end|>"


def test_as_chat_needs_a_template(folder_with: Any, records: Any, tmp_path: Path) -> None:
    folder = folder_with("")
    (folder / "chat_template.jinja").unlink()
    rows = records([{"prompt": "a", "completion": "b"}])
    with pytest.raises(TemplateError, match="has no chat template"):
        build(rows, tokenizer=folder, output=tmp_path / "o", as_chat=True)


# --- what the user is told ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "flags"),
    [
        ({"Question": "a", "Full_Answer": "b"}, "--map Question=instruction,Full_Answer=output"),
        ({"questionID": "1", "ask": "a", "reply": "b"}, "--map ask=instruction,reply=output"),
        ({"log": CHAT, "id": 1}, "--map log=messages"),
        ({"body": "a", "n": 3}, "--text-field body"),
        ({"chosen": "a", "rejected": "b"}, "--transform convert.py:to_chat"),
        ({"tree": {"text": "a"}}, "--transform convert.py:to_chat"),
        ({"turns": ["a?", "b?"], "id": "x"}, "--transform convert.py:to_chat"),
        ({"question": "a", "choices": ["b", "c"], "answer": 1}, "--transform convert.py:to_chat"),
        ({"chosen": CHAT, "rejected": CHAT}, "--map chosen=messages"),
    ],
)
def test_the_error_names_the_flags_for_the_keys(
    built: Any, row: dict[str, Any], flags: str
) -> None:
    code, output = built([row])
    assert code == 2
    found = re.search(r"try: (--[^#(]+)", output)
    assert found is not None
    assert found[1].strip() == flags
    if "transform" in flags:
        assert f"record['{next(iter(row))}']" in output
    else:
        assert built([row], *flags.split())[0] == 0


def test_the_error_for_single_messages_explains_conversations(built: Any) -> None:
    code, output = built([USER, ASSISTANT])
    assert code == 2
    assert '{"messages": [...]}' in output


def test_the_summary_names_format_template_and_columns(built: Any) -> None:
    code, output = built([{"text": "Write f.", "code": "def f(): pass", "task_id": 1}])
    assert code == 0
    assert "format: text; trained: every token" in output
    assert "not read: code, task_id" in output
    assert f"the column 'code' is not read, although its {SUGGESTS} (1 record, " in output
    _, output = built([{"messages": CHAT, "id": "x"}])
    assert re.search(r"format: messages, rendered by .*chat_template.jinja; trained: every", output)
    assert "content:" not in output


def test_columns_that_the_requested_format_does_not_read_are_named(built: Any) -> None:
    assert "not read: messages" in built([{"text": "a", "messages": CHAT}], "--format", "text")[1]
    row = {"prompt": "a", "completion": "b", "tools": [{"name": "f"}]}
    assert "not read: tools" in built([row])[1]


def test_repeated_columns_are_no_reason_to_warn(built: Any) -> None:
    row = {"prompt": USER["content"], "messages": CHAT, "answer": "Roter Sand."}
    assert "content:" not in built([row])[1]


def test_a_notice_is_logged_once_for_all_files(
    tmp_path: Path, tokenizer_dir: Path, caplog: Any
) -> None:
    for k in range(5):
        (tmp_path / f"{k}.jsonl").write_text(
            json.dumps({"prompt": f"{k}", "completion": "x"}) + "\n"
        )
    with caplog.at_level(logging.WARNING):
        build(str(tmp_path / "*.jsonl"), tokenizer=tokenizer_dir, output=tmp_path / "o")
    assert caplog.text.count("prompt and completion are strings") == 1
    assert "and 4 more" in caplog.text


# --- files ----------------------------------------------------------------------------------------


def test_a_line_that_is_a_list_is_a_conversation(
    chatml_dir: Path, built: Any, tmp_path: Path
) -> None:
    lines = [json.dumps(CHAT), json.dumps([{"from": "human", "value": "a"}, ASSISTANT])]
    made = prepare(lines, chatml_dir)
    assert made.text(0) == chatml(("user", USER["content"]), ("assistant", ASSISTANT["content"]))
    path = tmp_path / "a.json"
    path.write_text(json.dumps([CHAT, CHAT]))
    assert built(str(path))[0] == 0


def test_images_are_refused_by_name_or_dropped(chatml_dir: Path, built: Any) -> None:
    question = {"role": "user", "content": "<image>\nWhat is it?"}
    parts = {
        "role": "user",
        "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}],
    }
    rows = [
        {"messages": [question, ASSISTANT], "images": ["a.png"]},
        {"messages": [parts, ASSISTANT]},
        {"messages": [{**question, "images": ["b.png"]}, ASSISTANT]},
        {"question": "<image>What is it?", "answer": "Roter Sand.", "image": "c.png"},
    ]
    for row in rows:
        code, output = built([row])
        assert code == 2
        assert "image" in output
        assert "try: --images drop" in output
        made = prepare([row], chatml_dir, images="drop")
        assert made.text() == chatml(("user", "What is it?"), ("assistant", "Roter Sand."))
        assert made.batch.counts["warnings.images_dropped"] == 1
    assert "the images were removed" in built(rows[:3], "--images", "drop")[1]


@pytest.mark.parametrize("images", [None, [], "", [None], [""]])
def test_empty_columns_are_no_images(chatml_dir: Path, images: Any) -> None:
    row = {
        "messages": [{"role": "user", "content": "What is <image>?"}, ASSISTANT],
        "images": images,
    }
    for setting in ("error", "drop"):
        assert "What is <image>?" in shown([row], chatml_dir, images=setting)


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_images_of_tables_are_found_row_by_row(
    tokenizer_dir: Path, tmp_path: Path, suffix: str
) -> None:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = [None, {"bytes": b"x", "path": None}, None]
    table = pa.table({"messages": [CHAT] * 3, "picture": pa.array(images, kind)}).append_column(
        "images", pa.array([[], None, [images[1]]], pa.list_(kind))
    )
    path = tmp_path / f"a.{suffix}"
    if suffix == "parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
    settings: dict[str, Any] = {"tokenizer": tokenizer_dir, "overwrite": True}
    report = build(
        path,
        output=tmp_path / "o",
        on_bad_record="quarantine",
        max_rejected="100%",
        **settings,
    )
    assert report.manifest.accounting.rejected == {"images": 2}
    report = build(path, output=tmp_path / "o", images="drop", **settings)
    assert report.manifest.accounting.warnings["images_dropped"] == 2
    assert report.manifest.accounting.sequences == 3


def test_plain_text_is_read_on_request_and_named_otherwise(tmp_path: Path, built: Any) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "wiki.txt").write_bytes(b"\xef\xbb\xbfOne.\r\n\nTwo.\nThree.")
    (folder / "a.jsonl").write_text('{"text": "Four."}\n')
    code, output = built(str(folder))
    assert code == 0
    assert output.count("wiki.txt") == 1
    for flags, number in (([], 4), (["--text-unit", "file"], 2)):
        code, output = built(str(folder), "--format", "text", "--json", *flags)
        assert f'"records": {number},' in output
    code, output = built(str(folder / "wiki.txt"))
    assert code == 2
    assert "try: --format text" in output


def test_bytes_that_are_not_text_are_bad_records(tmp_path: Path, tokenizer_dir: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"fine\n\xff\xfe\nfine too\n")
    report = build(
        path,
        tokenizer=tokenizer_dir,
        output=tmp_path / "o",
        format="text",
        on_bad_record="quarantine",
        max_rejected="100%",
    )
    assert report.manifest.accounting.rejected == {"bad_utf8": 1}
    line = json.loads(rejected_file(tmp_path / "o").read_text())
    assert line["line"] == 2


def test_a_stream_reads_shapes_and_plain_text_like_a_build(
    tmp_path: Path, tokenizer_dir: Path, caplog: Any
) -> None:
    from sftprep.config import BuildConfig
    from sftprep.stream import PackedStream

    path = tmp_path / "a.txt"
    path.write_text("One.\nTwo.\n")
    rows = [{"question": "a", "answer": "b", "image": "c.png"}] * 20
    for source, settings in ((str(path), {"format": "text"}), (rows, {"images": "drop"})):
        config = BuildConfig.of(tokenizer=str(tokenizer_dir), lanes=1, **settings)
        stream = PackedStream(source, config=config)
        assert list(stream)
        assert stream.counts["records"] in (2, 20)
    assert stream.counts["warnings.images_dropped"] == 20
    with pytest.raises(FormatError):
        PackedStream([{"x": {}}], config=config)


def test_a_history_alongside_a_question_is_read_or_named(records, tokenizer_dir, tmp_path, caplog):
    pair = {"question": "And now?", "answer": "Now four."}
    path = records([{**pair, "history": [["How many?", "Three boats."]]}])
    build(path, tokenizer=tokenizer_dir, output=tmp_path / "a", workers=1)
    assert "history" not in caplog.text
    path = records([{**pair, "history": "a cold for two weeks"}], "other.jsonl")
    report = build(path, tokenizer=tokenizer_dir, output=tmp_path / "b", workers=1)
    assert report.readings[0].not_read == ("history",)


def test_an_image_without_bytes_and_path_is_no_image(records, tokenizer_dir, tmp_path):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    path = records([{"messages": messages, "image": {"bytes": None, "path": None}}])
    report = build(path, tokenizer=tokenizer_dir, output=tmp_path / "o", workers=1)
    assert report.manifest.accounting.sequences == 1
