"""Records are compared by what their format reads, or by the keys that the user names."""

from __future__ import annotations

import pytest

from sftprep import build
from sftprep.cli import main
from sftprep.errors import ConfigError
from tests.pipeline.builds import origins

QUESTION = {"role": "user", "content": "How?"}
ANSWER = {"role": "assistant", "content": "So."}


def run(source, tokenizer_dir, output, **more):
    return build(
        source, tokenizer=str(tokenizer_dir), output=str(output), max_length=256, **more
    ).manifest


def called(first, second, *, results=None, content="", **keys):
    """Return a record with two calls and their results, in the order of the calls by default."""
    calls = [
        {"type": "function", "function": {"name": name, "arguments": {"n": 1}}} for name in "fg"
    ]
    for call, name in zip(calls, (first, second), strict=True):
        if name is not None:
            call["id"] = name
    results = (first, second) if results is None else results
    turns = [
        {"role": "tool", "content": "r", **({} if name is None else {"tool_call_id": name})}
        for name in results
    ]
    call_turn = {"role": "assistant", "content": content, "tool_calls": calls}
    return {"messages": [QUESTION, call_turn, *turns, ANSWER], **keys}


def without_content(record):
    first, call_turn, *others = record["messages"]
    kept = {key: value for key, value in call_turn.items() if key != "content"}
    return {"messages": [first, kept, *others]}


EQUAL = [
    [called("call_a7", "call_a8"), called("call_b7", "x", id=2)],
    [called("call_a7", "call_a8"), called(None, None)],
    [
        called("a7", "a8", results=("a8", "a7")),
        called("b7", "b8", results=("b8", "b7")),
    ],
    [called("a", "b"), called("a", "b", content=None)],
    [called("a", "b"), without_content(called("c", "d"))],
    [{"text": "a", "id": 1, "score": 0.5}, {"id": 2, "text": "a", "at": "2024-01-01"}],
    [{"text": "a b"}, {"text": "a  b\n", "id": 2}],
    [{"prompt": "a", "completion": "b", "id": 1}, {"completion": "b", "prompt": "a", "id": 2}],
    [{"instruction": "a", "input": "", "output": "b"}, {"instruction": "a", "output": "b", "n": 1}],
    [{"messages": [QUESTION, ANSWER], "id": 1}, {"messages": [QUESTION, ANSWER], "tools": []}],
    [
        {"messages": [{**QUESTION, "timestamp": 1, "turn_identifier": "x"}, ANSWER]},
        {"messages": [QUESTION, {**ANSWER, "timestamp": 7, "tool_calls": []}]},
    ],
    [
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {
            "conversations": [
                {"from": "user", "value": "a"},
                {"from": "model", "value": "b", "n": 1},
            ]
        },
    ],
    [{"input_ids": [5, 6, 7], "id": 1}, {"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1]}],
]
DIFFERENT = [
    [called("a", "b"), called("a", "b", results=("b", "a"))],
    [called("a", "b"), called("a", "b", content="Wait.")],
    [
        {"messages": [QUESTION, {**ANSWER, "content": ""}, QUESTION, ANSWER]},
        {"messages": [QUESTION, QUESTION, ANSWER]},
    ],
    [{"text": "a"}, {"text": "b"}],
    [{"text": r"x \ni y"}, {"text": r"x \ti y"}],
    [
        {"messages": [QUESTION, ANSWER], "chat_template_kwargs": {"x": 2**64}},
        {"messages": [QUESTION, ANSWER], "chat_template_kwargs": {"x": 2**64 + 1}},
    ],
    [{"prompt": "a", "completion": "b c"}, {"prompt": "a b", "completion": "c"}],
    [{"messages": [QUESTION, ANSWER]}, {"messages": [QUESTION, {**ANSWER, "weight": 0.5}]}],
    [
        {"messages": [QUESTION, ANSWER]},
        {"messages": [QUESTION, {**ANSWER, "reasoning_content": "Hm."}]},
    ],
    [{"messages": [QUESTION, ANSWER]}, {"messages": [QUESTION, {**ANSWER, "name": "Ada"}]}],
    [
        {"messages": [QUESTION, ANSWER]},
        {"messages": [QUESTION, ANSWER], "tools": [{"function": {"name": "f"}}]},
    ],
    [
        {"messages": [QUESTION, ANSWER]},
        {"messages": [QUESTION, ANSWER], "chat_template_kwargs": {"enable_thinking": True}},
    ],
    [
        {"instruction": "a", "output": "b", "system": "Be brief."},
        {"instruction": "a", "output": "b"},
    ],
    [{"input_ids": [5, 6, 7]}, {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}],
]


@pytest.mark.parametrize("rows", EQUAL)
def test_records_that_differ_in_what_no_format_reads_are_duplicates(rows, tokenizer_dir, tmp_path):
    manifest = run(rows, tokenizer_dir, tmp_path / "o", duplicates="drop")
    assert sum(manifest.accounting.left_out.values()) == 1


@pytest.mark.parametrize("rows", [EQUAL[0], EQUAL[1], EQUAL[2]])
def test_ids_of_calls_are_not_among_the_keys_that_are_compared(rows, tokenizer_dir, tmp_path):
    settings = {"duplicates": "drop", "duplicates_by": ["messages"]}
    manifest = run(rows, tokenizer_dir, tmp_path / "o", **settings)
    assert sum(manifest.accounting.left_out.values()) == 1
    for k, different in enumerate(DIFFERENT[:2]):
        manifest = run(different, tokenizer_dir, tmp_path / f"o{k}", **settings)
        assert manifest.accounting.left_out == {}


@pytest.mark.parametrize("rows", DIFFERENT)
def test_records_that_differ_in_what_their_format_reads_are_kept(rows, tokenizer_dir, tmp_path):
    manifest = run(rows, tokenizer_dir, tmp_path / "o", duplicates="drop")
    assert manifest.accounting.left_out == {}


def test_ids_do_not_move_records_between_training_and_evaluation(tokenizer_dir, tmp_path):
    held = []
    for name, offset in (("a", 0), ("b", 1000)):
        rows = [{"text": f"text {n}", "id": n + offset} for n in range(100)]
        run(rows, tokenizer_dir, tmp_path / name, eval_fraction=0.3)
        held.append(origins(tmp_path / name / "eval"))
    assert held[0] == held[1]
    assert 10 < len(held[0]) < 60


def test_ids_of_calls_do_not_move_records_between_training_and_evaluation(tokenizer_dir, tmp_path):
    rows = []
    for n in range(60):
        for name in ("a", "b"):
            row = called(f"call_{name}{n}", f"call_{name}{n + 1}")
            row["messages"][0] = {"role": "user", "content": f"Question {n}?"}
            rows.append(row)
    run(rows, tokenizer_dir, tmp_path / "o", eval_fraction=0.3)
    held = origins(tmp_path / "o" / "eval")
    assert 4 < len(held) < 100
    assert {origin // 2 * 2 for origin in held} == {o for o in held if o % 2 == 0}
    assert {origin // 2 * 2 + 1 for origin in held} == {o for o in held if o % 2 == 1}


def test_the_keys_of_duplicates_by_decide_about_duplicates_and_evaluation(tokenizer_dir, tmp_path):
    rows = [{"text": f"text {n}", "url": f"u{n // 4}", "part": n % 2} for n in range(80)]
    made = run(rows, tokenizer_dir, tmp_path / "d", duplicates="drop", duplicates_by="url")
    assert made.accounting.left_out == {"duplicate": 60}
    made = run(rows, tokenizer_dir, tmp_path / "e", duplicates="drop", duplicates_by="url, part")
    assert made.accounting.left_out == {"duplicate": 40}
    run(rows, tokenizer_dir, tmp_path / "o", eval_fraction=0.4, duplicates_by=["url"])
    held = {origin // 4 for origin in origins(tmp_path / "o" / "eval")}
    assert len(origins(tmp_path / "o" / "eval")) == 4 * len(held) > 0


def test_the_keys_are_those_of_the_transformed_record(tokenizer_dir, tmp_path):
    made = run(
        [{"page": n, "t": "a"} for n in range(4)],
        tokenizer_dir,
        tmp_path / "o",
        transform=lambda r: {"text": f"text {r['page']}", "half": r["page"] // 2},
        duplicates="drop",
        duplicates_by="half",
    )
    assert made.accounting.left_out == {"duplicate": 2}


def test_a_record_without_the_keys_is_compared_by_its_content(tokenizer_dir, tmp_path):
    rows = [{"text": "a", "url": "u"}, {"text": "b"}, {"text": "c", "url": None}, {"text": "b"}]
    made = run(rows, tokenizer_dir, tmp_path / "o", duplicates="drop", duplicates_by="url")
    assert made.accounting.left_out == {"duplicate": 1}
    assert set(origins(tmp_path / "o")) == {0, 1, 2}


def test_keys_of_a_mapped_record_may_have_their_old_or_new_name(tokenizer_dir, tmp_path):
    rows = [{"q": "a", "id": 1}, {"q": "a", "id": 2}]
    made = run(rows, tokenizer_dir, tmp_path / "o", duplicates="drop", map="q=text")
    assert made.accounting.left_out == {"duplicate": 1}


def test_duplicates_by_needs_a_comparison(records, tokenizer_dir, tmp_path, capsys):
    with pytest.raises(ConfigError, match="not compared"):
        run([{"text": "a"}], tokenizer_dir, tmp_path / "o", duplicates_by="url")
    path = records([{"text": "a", "u": 1}, {"text": "b", "u": 1}])
    arguments = ["build", path, "--tokenizer", str(tokenizer_dir), "--output", str(tmp_path / "c")]
    with pytest.raises(SystemExit) as caught:
        main([*arguments, "--duplicates", "drop", "--duplicates-by", "u"])
    assert caught.value.code == 0
    assert "left out: duplicate" in capsys.readouterr().out


def test_spills_of_a_build_without_a_comparison_are_not_taken_for_one_with_it(
    records, tokenizer_dir, tmp_path
):
    path = records([{"text": "a", "id": 1}, {"text": "a", "id": 2}])
    common = {"keep_spill": True, "overwrite": True}
    run(path, tokenizer_dir, tmp_path / "o", **common)
    assert run(
        path, tokenizer_dir, tmp_path / "o", duplicates="drop", **common
    ).accounting.left_out == {"duplicate": 1}
    report = build(
        path, tokenizer=str(tokenizer_dir), output=str(tmp_path / "o"), max_length=256,
        duplicates="drop", seed=1, **common,
    )  # fmt: skip
    assert report.reused == 1
    assert report.manifest.accounting.left_out == {"duplicate": 1}


def test_the_held_out_records_do_not_depend_on_the_chat_template(tokenizer_dir, tmp_path):
    plain = tmp_path / "plain"
    plain.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (plain / name).write_bytes((tokenizer_dir / name).read_bytes())
    rows = [{"instruction": f"Count to {n}.", "output": str(n)} for n in range(60)]
    held = []
    for number, tokenizer in enumerate((tokenizer_dir, plain)):
        run(rows, tokenizer, tmp_path / f"{number}", eval_fraction=0.3)
        held.append(origins(tmp_path / f"{number}" / "eval"))
    assert held[0] == held[1]


def test_the_same_conversation_in_two_layouts_is_a_duplicate(records, tokenizer_dir, tmp_path):
    turns = [{"from": "human", "value": "How?"}, {"from": "gpt", "value": "So."}]
    paths = [
        records([{"messages": [QUESTION, ANSWER]}], "a.jsonl"),
        records([{"conversations": turns}], "b.jsonl"),
    ]
    made = run(paths, tokenizer_dir, tmp_path / "o", duplicates="drop")
    assert made.accounting.left_out == {"duplicate": 1}
