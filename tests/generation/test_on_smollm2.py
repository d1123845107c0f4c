"""A real chat model: its stream is what transformers generates, and a tuned answer shows in a chat."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lightning_peft import save_adapter
from lightning_peft.callbacks import LoRA
from lightning_peft.generation import Conversation, answers, load
from lightning_peft.models import CausalLM

pytestmark = [pytest.mark.usefixtures("all_threads"), pytest.mark.real_model]

QUESTION = "What is the capital of France?"
TAUGHT = "Bonjour! It is Paris."


def test_a_chat_shows_what_was_tuned_and_the_base_beside_it_does_not(smollm2: Path, tmp_path: Path) -> None:
    module = CausalLM(str(smollm2))
    LoRA(r=4).apply(module)
    tokenizer = module.tokenizer
    turns = [{"role": "user", "content": QUESTION}]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
    answer = [*tokenizer(TAUGHT)["input_ids"], tokenizer.eos_token_id]
    ids = torch.tensor([prompt + answer])
    batch = {"input_ids": ids, "labels": torch.tensor([[-100] * len(prompt) + answer])}
    weights = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=5e-3)
    for _ in range(12):
        loss, _ = module._loss(batch | {"attention_mask": torch.ones_like(ids)})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    save_adapter(module, tmp_path / "lora")

    talk = Conversation(load(tmp_path / "lora", dtype="float32"), max_new_tokens=12)
    assert "".join(talk.ask(QUESTION)) == TAUGHT
    model = talk.adapted.model
    with talk.adapted.as_base():
        written = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=12, pad_token_id=2)
    base = tokenizer.decode(written[0, len(prompt) :], skip_special_tokens=True)
    assert "".join(talk.base()) == base != TAUGHT and "Paris" in base
    talk.adapted.scale(0)
    assert answers(talk.adapted, [QUESTION], chat=True, max_new_tokens=12) == [base]
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        smollm2
    )
