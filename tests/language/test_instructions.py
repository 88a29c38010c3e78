import json

import pytest

from weightshare.errors import UserError
from weightshare.language import (
    Instruction,
    encode_instructions,
    holds_instructions,
    pad,
    read_instructions,
)

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def chat_tokenizer(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", CHAT)
    return tokenizer


def test_both_spellings_of_a_row_are_read(tmp_path):
    rows = [
        {"prompt": "Name a tool.\n\nHere is a shed.", "response": "A hammer", "category": "qa"},
        {"instruction": "Name a tool.", "context": " Here is a shed. ", "response": "A hammer"},
        {"instruction": "Name a tool.", "context": "", "response": "A hammer"},
        {"prompt": "Nothing follows", "response": " "},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with_context = Instruction("Name a tool.\n\nHere is a shed.", "A hammer")
    assert read_instructions(tmp_path / "a.jsonl") == [
        with_context,
        with_context,
        Instruction("Name a tool.", "A hammer"),
    ]


def test_the_forms_of_other_collections_are_read_too(tmp_path):
    turns = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Who?")]
    messages = [{"role": role, "content": text} for role, text in [*turns, ("assistant", "I.")]]
    rows = [
        {"instruction": "Add", "input": "1 and 2", "output": "3", "text": "all of it"},
        {"prompt": "Add", "completion": "3"},
        {"messages": messages},
    ]
    (tmp_path / "a.jsonl").write_text("\n" + "\n\n".join(map(json.dumps, rows)))
    assert read_instructions(tmp_path / "a.jsonl") == [
        Instruction("Add\n\n1 and 2", "3"),
        Instruction("Add", "3"),
        Instruction("Who?", "I.", tuple(turns[:3])),
    ]
    assert holds_instructions(tmp_path / "a.jsonl")
    for text in ("", "{", "[1]", '{"text": "a"}'):
        (tmp_path / "b.jsonl").write_text(text)
        assert not holds_instructions(tmp_path / "b.jsonl")


def test_of_a_conversation_the_last_answer_is_learnt(chat_tokenizer, monkeypatch):
    row = Instruction("Who?", "I", (("user", "Hi"), ("assistant", "Hello")))
    for template, before in (
        (CHAT, "<user>Hi<assistant>Hello<user>Who?<assistant>"),
        (None, "Hi\n\nHello\n\nWho?\n\n"),
    ):
        monkeypatch.setattr(chat_tokenizer, "chat_template", template)
        ((ids, labels),) = encode_instructions(chat_tokenizer, [row], 128)
        learnt = [i for i, label in zip(ids, labels, strict=True) if label != -100]
        text = chat_tokenizer.decode(ids, skip_special_tokens=True)
        assert text == f"{before}I"
        assert chat_tokenizer.decode(learnt, skip_special_tokens=True) == "I"


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        '{"prompt": "a"}',
        '{"prompt": 1, "response": "b"}',
        '{"messages": [{"role": "user", "content": "a"}]}',
        '{"messages": "a"}',
    ],
)
def test_a_row_that_is_no_instruction_is_named(tmp_path, line):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "response": "b"}\n' + line)
    with pytest.raises(UserError, match=r"[Ll]ine 2"):
        read_instructions(tmp_path / "a.jsonl")


def test_a_missing_or_empty_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="No instruction file"):
        read_instructions(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_text('{"prompt": "", "response": "b"}')
    with pytest.raises(UserError, match="holds no instruction"):
        read_instructions(tmp_path / "a.jsonl")


def test_only_the_response_and_its_end_are_learnt(tokenizer):
    ((ids, labels),) = encode_instructions(tokenizer, [Instruction("Count", "bytes, naïve")], 64)
    assert tokenizer.decode(ids) == "Count\n\nbytes, naïve<|end|>"
    learnt = [token for token, label in zip(ids, labels, strict=True) if label != -100]
    assert learnt == [label for label in labels if label != -100]
    assert tokenizer.decode(learnt) == "bytes, naïve<|end|>"


def test_a_chat_template_is_used_where_there_is_one(chat_tokenizer):
    ((ids, labels),) = encode_instructions(chat_tokenizer, [Instruction("Count", "bytes")], 64)
    assert chat_tokenizer.decode(ids) == "<user>Count<|end|><assistant>bytes<|end|>"
    assert chat_tokenizer.decode([i for i in labels if i != -100]) == "bytes<|end|>"


def test_a_template_that_hides_the_border_is_refused(chat_tokenizer, monkeypatch):
    shifting = "{% if add_generation_prompt %}open{% else %}closed{% endif %}"
    monkeypatch.setattr(chat_tokenizer, "chat_template", shifting)
    with pytest.raises(UserError, match="chat template"):
        encode_instructions(chat_tokenizer, [Instruction("Count", "bytes")], 64)


def test_rows_are_cut_and_those_without_a_response_left_are_dropped(tokenizer):
    rows = [Instruction("Count " * 40, "bytes"), Instruction("Count", "bytes " * 40)]
    encoded = encode_instructions(tokenizer, rows, 16)
    assert len(encoded) == 1
    assert len(encoded[0][0]) == 16
    batch = pad(*map(list, zip(*encoded, strict=True)))
    assert (batch["labels"] != -100).sum() > 5
    with pytest.raises(UserError, match="No response fits"):
        encode_instructions(tokenizer, rows[:1], 16)
    with pytest.raises(UserError, match="at least 2"):
        encode_instructions(tokenizer, rows, 1)
