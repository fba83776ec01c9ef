"""Which turns are trained: by `train_on`, by switches of single messages, and by `expand_turns`."""

from __future__ import annotations

import json
from itertools import islice
from unicodedata import normalize

import pytest

from sftprep.config import BuildConfig
from sftprep.errors import ConfigError, TemplateError
from sftprep.pipeline.prepare.setup import prepare_recipe
from sftprep.render.renderer import Renderer
from tests.semantics.conftest import CHATML, FORGETFUL
from tests.semantics.prepared import prepare
from tests.support import SHARED, needs_shared

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "Two."},
    {"role": "user", "content": "Three?"},
    {"role": "assistant", "content": "Four."},
]
MARKED = CHATML.replace(
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}",
    "{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}{%"
    " generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}{% else %}{{"
    " message['content'] }}<|im_end|>{% endif %}{{ '\n' }}",
)


def switched(**switches):
    """Return the conversation with switches on some messages, such as a4={"train": False}."""
    return [{**m, **switches.get(f"{m['role'][0]}{number}", {})} for number, m in enumerate(TALK)]


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["derived", "marked"])
@pytest.mark.parametrize(
    ("train_on", "expected"),
    [
        ("assistant", ["Two.<|im_end|>", "Four.<|im_end|>"]),
        ("last-assistant", ["Four.<|im_end|>"]),
        ("auto", None),
        ("all", None),
    ],
)
@pytest.mark.parametrize("backend", ["auto", "jinja"])
def test_train_on_selects_the_trained_turns(folder_with, template, train_on, expected, backend):
    made = prepare(
        [{"messages": TALK}], folder_with(template), train_on=train_on, template_backend=backend
    )
    assert made.trained() == (expected or [made.text()])
    assert made.batch.loss_weights is None


@pytest.mark.parametrize("key", ["weight", "train", "loss_weight"])
@pytest.mark.parametrize("turns", [("a2",), ("u1",), ("s0", "u1", "a2", "u3", "a4")])
def test_a_switch_that_is_null_is_absent(folder_with, key, turns):
    rows = [{"messages": switched(**{turn: {key: None} for turn in turns})}, {"messages": TALK}]
    made = prepare(rows, folder_with(CHATML))
    assert made.text(0) == made.text(1)
    assert made.trained(0) == [made.text(0)]
    assert made.trained(0) == made.trained(1)


@pytest.mark.parametrize(
    ("turns", "trained"),
    [
        ([("assistant", "Hi"), ("user", " my words"), ("assistant", " ok")], [" ok"]),
        ([("assistant", ""), ("user", " my words"), ("assistant", " ok")], [" ok"]),
        ([("user", "lo"), ("assistant", ""), ("user", "ve"), ("assistant", " ok")], [" ok"]),
        ([("assistant", "\n"), ("user", "my words"), ("assistant", " ok")], [" ok"]),
    ],
)
@pytest.mark.parametrize("backend", ["auto", "jinja"])
def test_a_marked_span_at_the_first_token_trains_no_words_of_the_user(
    folder_with, turns, trained, backend
):
    """In transformers, a span that ends with the first token of a text marks all of it."""
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    messages = [{"role": role, "content": content} for role, content in turns]
    made = prepare(
        [{"messages": messages}],
        folder_with(template),
        train_on="assistant",
        template_backend=backend,
    )
    assert [run for run in made.trained() if "my" in run or "ve" in run] == []
    assert made.trained()[-1:] == trained


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["derived", "marked"])
def test_assistant_turns_are_trained_only_in_the_completion(folder_with, template):
    row = {"prompt": TALK[:2], "completion": TALK[2:]}
    made = prepare([row], folder_with(template))
    assert made.trained() == [made.text().partition("assistant\n")[2]]
    made = prepare([row], folder_with(template), train_on="assistant")
    assert made.trained() == ["Two.<|im_end|>", "Four.<|im_end|>"]
    made = prepare(
        [{"prompt": TALK[:4], "completion": TALK[4:]}], folder_with(template), train_on="assistant"
    )
    assert made.trained() == ["Four.<|im_end|>"]
    assert prepare([row], folder_with(template), train_on="last-assistant").trained() == [
        "Four.<|im_end|>"
    ]


SWITCHES = [
    # switches, train_on, trained, weights of the trained tokens
    ({"a2": {"weight": 0}}, "auto", ["Four.<|im_end|>"], None),
    ({"a2": {"weight": 1}}, "auto", ["Two.<|im_end|>", "Four.<|im_end|>"], None),
    ({"a2": {"train": False}}, "assistant", ["Four.<|im_end|>"], None),
    ({"a4": {"train": False}}, "last-assistant", [], None),
    (
        {"u1": {"train": True}, "a4": {"train": False}},
        "auto",
        ["One?<|im_end|>", "Two.<|im_end|>"],
        None,
    ),
    (
        {"u1": {"loss_weight": 0.0}, "a2": {"loss_weight": 0.5}},
        "auto",
        ["Two.<|im_end|>", "Four.<|im_end|>"],
        [0.5, 1.0],
    ),
    ({"u3": {"loss_weight": 0.25}}, "last-assistant", ["Four.<|im_end|>"], None),
    (
        {"s0": {"weight": 2}},
        "assistant",
        ["Be brief.<|im_end|>", "Two.<|im_end|>", "Four.<|im_end|>"],
        [2.0, 1.0, 1.0],
    ),
]


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["derived", "marked"])
@pytest.mark.parametrize(("switches", "train_on", "expected", "weights"), SWITCHES)
def test_switches_of_messages_override_train_on(
    folder_with, template, switches, train_on, expected, weights
):
    rows = [{"messages": switched(**switches)}]
    made = prepare(rows, folder_with(template), train_on=train_on)
    if not expected:
        assert len(made) == 0
        assert made.batch.counts["dropped.no_trained_token"] == 1
        return
    assert made.trained() == expected
    if weights is None:
        assert made.batch.loss_weights is None
        return
    found = [weight for weight in made.weights() if weight]
    steps = [weight for k, weight in enumerate(found) if k == 0 or found[k - 1] != weight]
    assert steps == [
        weight for k, weight in enumerate(weights) if k == 0 or weights[k - 1] != weight
    ]
    assert [weight > 0 for weight in made.weights()] == made.batch.completion_mask.tolist()


def test_with_all_only_switched_off_messages_are_masked(folder_with):
    made = prepare(
        [{"messages": switched(a2={"weight": 0}, a4={"loss_weight": 0.5})}],
        folder_with(CHATML),
        train_on="all",
    )
    before, after = made.text().split("Two.<|im_end|>")
    assert made.trained() == [before, after]
    weights = made.weights()
    assert sorted(set(weights)) == [0, 0.5, 1]
    half = [k for k, weight in enumerate(weights) if weight == 0.5]
    assert (
        made.tokenizer.decode(made.batch.input_ids[half].tolist(), skip_special_tokens=False)
        == "Four.<|im_end|>"
    )


def test_switches_do_not_affect_other_records(folder_with):
    rows = [{"messages": TALK}, {"messages": switched(a2={"weight": 0})}]
    made = prepare(rows, folder_with(CHATML))
    assert made.trained(0) == [made.text(0)]
    assert made.trained(1) == ["Four.<|im_end|>"]


@pytest.mark.parametrize(
    "switch", [{"weight": "1"}, {"weight": -1}, {"loss_weight": [1]}, {"train": {}}]
)
def test_a_switch_that_is_not_a_number_is_rejected(folder_with, switch):
    made = prepare([{"messages": switched(a2=switch)}], folder_with(CHATML))
    assert [r.reason for r in made.batch.rejected] == ["bad_type"]


def test_switches_work_on_sharegpt_turns(folder_with):
    turns = [{"from": "human", "value": "One?"}, {"from": "gpt", "value": "Two.", "train": False}]
    turns += [{"from": "human", "value": "Three?"}, {"from": "gpt", "value": "Four."}]
    assert prepare([{"conversations": turns}], folder_with(CHATML)).trained() == ["Four.<|im_end|>"]


@needs_shared
@pytest.mark.parametrize("tokenizer", ["qwen3", "smollm2", "mistral-v3"])
def test_loss_weights_of_a_real_file_are_applied(tokenizer):
    with open(SHARED / "datasets" / "v1_sft_demo.jsonl", encoding="utf-8") as file:
        rows = [json.loads(line) for line in islice(file, 40)]
    made = prepare(rows, SHARED / "tokenizers" / tokenizer, max_length=4096)
    assert len(made) == 40
    for number, row in enumerate(rows):
        (answer,) = [m["content"][0]["value"] for m in row["messages"] if m["loss_weight"]]
        (trained,) = made.trained(number)
        assert answer.strip() in trained
        assert trained.endswith(("<|im_end|>", "</s>"))


# --- expand_turns ---------------------------------------------------------------------------------

THOUGHTS = [
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "Two.", "reasoning_content": "Hm."},
    {"role": "user", "content": "Three?"},
    {"role": "assistant", "content": "Four.", "reasoning_content": "Hm hm."},
]


@pytest.mark.parametrize("train_on", ["auto", "completion", "assistant"])
def test_each_turn_is_trained_as_the_model_sees_it(folder_with, train_on):
    made = prepare(
        [{"messages": THOUGHTS}], folder_with(FORGETFUL), expand_turns=True, train_on=train_on
    )
    start = "<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n"
    first, second = made.text(0), made.text(1)
    assert first == start + "<think>Hm.</think>Two.<|im_end|>\n"
    # The second turn sees the first without its reasoning.
    head = start + "Two.<|im_end|>\n<|im_start|>user\nThree?<|im_end|>\n<|im_start|>assistant\n"
    assert second == head + "<think>Hm hm.</think>Four.<|im_end|>\n"
    end = "" if train_on == "assistant" else "\n"
    assert [made.trained(0), made.trained(1)] == [
        [f"<think>Hm.</think>Two.<|im_end|>{end}"],
        [f"<think>Hm hm.</think>Four.<|im_end|>{end}"],
    ]
    assert made.batch.line_of.tolist() == [0, 0]
    assert made.batch.counts["extra.turns"] == 1


def test_with_last_assistant_only_the_last_turn_is_an_example(folder_with):
    made = prepare(
        [{"messages": THOUGHTS}],
        folder_with(FORGETFUL),
        expand_turns=True,
        train_on="last-assistant",
    )
    assert [made.trained(k) for k in range(len(made))] == [["<think>Hm hm.</think>Four.<|im_end|>"]]
    # No sequence has the reasoning of the first turn.
    assert made.batch.counts["warnings.reasoning_not_shown"] == 1
    assert "warnings.last_reasoning_not_shown" not in made.batch.counts


@pytest.mark.parametrize("num_messages", [3, 4])
def test_reasoning_in_the_sequence_of_a_later_turn_is_not_counted(folder_with, num_messages):
    shown = "message.reasoning_content is defined and loop.index > messages|length - 2"
    template = FORGETFUL.replace("message.reasoning_content is defined and loop.last", shown)
    messages = [*THOUGHTS[:1], {**THOUGHTS[1], "weight": 0}, *THOUGHTS[5 - num_messages + 1 :]]
    assert len(messages) == num_messages
    made = prepare([{"messages": messages}], folder_with(template), expand_turns=True)
    assert made.batch.counts.get("warnings.reasoning_not_shown", 0) == (num_messages == 4)


def test_switched_off_turns_are_not_expanded_and_weights_apply_to_their_turn(folder_with):
    messages = [dict(m) for m in THOUGHTS]
    messages[1]["weight"] = 0
    messages[3]["loss_weight"] = 0.5
    made = prepare(
        [{"messages": messages}, {"messages": THOUGHTS[:1]}],
        folder_with(FORGETFUL),
        expand_turns=True,
    )
    assert len(made) == 1
    assert {weight for weight in made.weights() if weight} == {0.5}
    counts = made.batch.counts
    assert counts["warnings.reasoning_not_shown"] == 1
    assert (counts["dropped.no_assistant_turn"], counts["records"], counts["sequences"]) == (
        1,
        2,
        1,
    )


def test_only_turns_of_the_completion_are_expanded(folder_with):
    made = prepare(
        [{"prompt": THOUGHTS[:2], "completion": THOUGHTS[2:]}],
        folder_with(FORGETFUL),
        expand_turns=True,
    )
    assert [made.trained(k) for k in range(len(made))] == [
        ["<think>Hm hm.</think>Four.<|im_end|>\n"]
    ]
    assert made.batch.counts["warnings.reasoning_not_shown"] == 1


def test_expand_turns_with_all_is_rejected():
    with pytest.raises(ConfigError, match="again in each"):
        BuildConfig.of(expand_turns=True, train_on="all")


# --- unproven masks -------------------------------------------------------------------------------


def test_a_template_without_provable_turns_is_rejected(folder_with):
    folder = folder_with("{{ messages | map(attribute='content') | join(' ') }}")
    recipe, _ = prepare_recipe(
        BuildConfig.of(inputs="-", tokenizer=str(folder), output="-", train_on="assistant")
    )
    with pytest.raises(TemplateError, match="while its loop is at that"):
        Renderer(recipe).check_masks()


def test_a_conversation_whose_mask_cannot_be_proven_is_quarantined(folder_with):
    folder = folder_with(
        CHATML.replace("message['content'] +", "message['content'] | replace('Two', '2') +")
    )
    made = prepare(
        [{"messages": TALK}, {"messages": TALK[:2] + TALK[4:]}], folder, train_on="assistant"
    )
    assert [(r.line, r.reason) for r in made.batch.rejected] == [(0, "mask_unproven")]
    assert made.trained(0) == ["Four.<|im_end|>"]


@needs_shared
@pytest.mark.parametrize(
    "tokenizer", ["qwen3", "smollm2", "mistral-v1", "mistral-v3", "deepseek-v4", "tiny-chatml-4k"]
)
def test_trained_tokens_of_real_tokenizers_are_the_words_of_the_assistant(tokenizer):
    with open(
        SHARED / "datasets" / "chatterbot_multilingual_messages.jsonl", encoding="utf-8"
    ) as file:
        rows = [{"messages": json.loads(line)["messages"]} for line in islice(file, 0, None, 120)]
    made = prepare(
        rows, SHARED / "tokenizers" / tokenizer, train_on="assistant", max_length=100_000
    )
    assert made.batch.rejected == []
    assert "warnings.end_of_turn_not_trained" not in made.batch.counts
    for number, line in enumerate(made.batch.line_of.tolist()):
        # Some tokenizers compose characters.
        said = [
            normalize("NFC", m["content"].strip())
            for m in rows[line]["messages"]
            if m["role"] == "assistant"
        ]
        runs = made.trained(number)
        assert len(runs) == len(said)
        ends = ("<|im_end|>", "</s>", "<｜end▁of▁sentence｜>")
        assert all(
            text in normalize("NFC", run) and run.rstrip().endswith(ends)
            for text, run in zip(said, runs, strict=True)
        )
        user_texts = [
            m["content"].strip()
            for m in rows[line]["messages"]
            if m["role"] == "user" and len(m["content"]) > 30
        ]
        assert not any(text in run for text in user_texts for run in runs)
