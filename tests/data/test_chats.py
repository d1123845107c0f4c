"""Chats of a file are learnt through the chat template; whatever is no chat is told with its row."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import lightning as L
import pytest
import torch
from chat_templates import TEMPLATES, chat_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_peft.callbacks import LoRA
from lightning_peft.data import Chats
from lightning_peft.data.chat_template import render_chat
from lightning_peft.files.data_error import DataError
from lightning_peft.models import CausalLM
from lightning_peft.prompt_end import prompt_end

CHATS = [
    {"messages": [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "It is so."}]},
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Who are you?"},
            {"role": "assistant", "content": "Hello."},
            {"role": "user", "content": "And you, what is it that you are?"},
            {"role": "assistant", "content": "Hello you."},
        ]
    },
]


def written(folder: Path, rows: list[dict], name: str = "my.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def set_up(path: str, template: str | None = "chatml", **options) -> Chats:
    data = Chats(path, chat_tokenizer(template), **{"val_fraction": 0.0, **options})
    data.setup("fit")
    return data


def test_labels_are_what_the_assistant_says_and_prompt_end_is_where_it_is_asked(tmp_path: Path) -> None:
    data = set_up(written(tmp_path, CHATS))
    (batch,) = data.train_dataloader()
    tokenizer = data.encoder
    said = {tokenizer.decode(labels[labels != -100]) for labels in batch["labels"]}
    assert said == {"It is so.<|im_end|>", "Hello.<|im_end|>Hello you.<|im_end|>"}
    assert torch.equal(prompt_end(batch), batch["prompt_end"]), "as the labels have it"
    for ids, end in zip(batch["input_ids"], batch["prompt_end"], strict=True):
        turns = CHATS[1]["messages"][:2] if "Be brief" in tokenizer.decode(ids) else CHATS[0]["messages"][:1]
        assert ids[: end + 1].tolist() == render_chat(tokenizer, turns, add_generation_prompt=True)


def test_messages_are_read_as_sharegpt_has_them_and_in_columns(tmp_path: Path) -> None:
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    shared = [
        {"conversations": [{"from": names[m["role"]], "value": m["content"]} for m in row["messages"]]} for row in CHATS
    ]
    columns = [{"question": "What is it?", "answer": "It is so."}, {"question": "Who?", "answer": "Hello."}]
    own, other = (set_up(written(tmp_path, rows, f"{i}.jsonl")) for i, rows in enumerate((CHATS, shared)))
    assert [own.chat(row) for row in own.rows] == [other.chat(row) for row in other.rows]
    table = set_up(written(tmp_path, columns), prompt="question", target="answer", system="Be brief.")
    assert [len(table.chat(row)) for row in table.rows] == [3, 3]
    assert table.prompts()[0] == table.encoder.apply_chat_template(
        table.chat(table.rows[0])[:2], add_generation_prompt=True, tokenize=False
    )


@pytest.mark.parametrize(
    ("messages", "sentence"),
    [
        ([{"role": "user", "content": "Hi."}], "row 2: the chat has no message of the assistant's"),
        (
            [{"role": "user", "content": "Hi."}, {"role": "user", "content": "Oh."}, CHATS[0]["messages"][1]],
            "row 2: messages 1 and 2 are both the user's",
        ),
        ([CHATS[0]["messages"][1]], "row 2: the first message after the system's, if there is one, must be the user's"),
        ([*CHATS[0]["messages"], {"role": "system", "content": "Hm."}, *CHATS[0]["messages"]], "message 3 is the sys"),
        ([{"role": "tool", "content": "4"}, *CHATS[0]["messages"]], "row 2, message 1 has the role 'tool'"),
        ([{"role": "user", "content": ""}, CHATS[0]["messages"][1]], "row 2, message 1 has a content that is empty"),
        (
            [{"role": "user"}, CHATS[0]["messages"][1]],
            "row 2, message 1 needs role and content, or from and value",
        ),
        ("Hi.", "row 2: the messages are a text that is no JSON"),
        (None, "row 2: the messages are a NoneType"),
    ],
)
def test_what_is_no_chat_is_told_with_its_row(tmp_path: Path, messages: object, sentence: str) -> None:
    with pytest.raises(DataError, match=rf"my\.jsonl, {sentence}" if sentence.startswith("row") else sentence):
        Chats(written(tmp_path, [CHATS[0], {"messages": messages}])).prepare_data()


def test_a_tokenizer_without_template_and_a_template_without_system_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no chat template"):
        set_up(written(tmp_path, CHATS), template=None)
    data = set_up(written(tmp_path, CHATS), template="gemma")
    with pytest.raises(DataError, match=r"my\.jsonl, row 2: The chat template does not take messages of system, user"):
        data.train_dataloader()


def test_chats_that_are_too_long_are_left_out_and_counted_in_one_line(tmp_path: Path) -> None:
    data = set_up(written(tmp_path, [*CHATS, {"prompt": 1, "messages": CHATS[1]["messages"]}]), max_length=30)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        (batch,) = data.train_dataloader()
    assert len(batch["input_ids"]) == 1
    (line,) = [str(warning.message) for warning in told if "max_length" in str(warning.message)]
    assert "2 of 3 train rows" in line and "left out" in line and "\n" not in line


@pytest.mark.parametrize("name", ["qwen3", "llama2"])
def test_tuned_on_chats_a_tiny_model_says_what_it_has_learnt_and_stops(tmp_path: Path, name: str) -> None:
    """Generated by the template's own prompt; a model that had learnt other tokens could not."""
    tokenizer = chat_tokenizer(name)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    L.seed_everything(0, verbose=False)
    module = CausalLM(str(tmp_path / "model"), learning_rate=2e-2)
    data = Chats(written(tmp_path, CHATS[:1] * 8), val_fraction=0.0, batch_size=8)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(accelerator="cpu", max_epochs=60, callbacks=[LoRA(r=16)], enable_model_summary=False, **quiet)
    trainer.fit(module, data)
    prompt = data.prompts()[0]
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    assert ids[0].tolist() == render_chat(tokenizer, CHATS[0]["messages"][:1], add_generation_prompt=True)
    stop = tokenizer.convert_tokens_to_ids("</s>" if name == "llama2" else "<|im_end|>")
    out = module.backbone.generate(ids, max_new_tokens=30, do_sample=False, eos_token_id=stop, pad_token_id=0)
    said = tokenizer.decode(out[0, ids.shape[1] :])
    assert said == {"llama2": " It is so. </s>", "qwen3": "<think>\n\n</think>\n\nIt is so.<|im_end|>"}[name]


def test_the_shipped_chats_have_their_form() -> None:
    data = set_up("package:chats")
    answers = [m["content"] for row in data.rows for m in data.chat(row) if m["role"] == "assistant"]
    assert len(data.rows) == 50 and all(a.startswith("Aye. ") and a.endswith(" Fair winds!") for a in answers)
    assert len(set(answers)) == len(answers) > 50


def test_every_template_gives_batches_of_the_shipped_chats() -> None:
    for name in TEMPLATES:
        data = Chats("package:chats", chat_tokenizer(name), limit=8, val_fraction=0.25)
        data.setup("fit")
        for loader in (data.train_dataloader(), data.val_dataloader()):
            for batch in loader:
                assert prompt_end(batch) is not None and bool((batch["labels"] != -100).any(-1).all())
