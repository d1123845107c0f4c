"""An adapter's folder is written whole or not at all, and read with every check."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from edits import add_lora, both, edited, fill, logits
from tiny_models import tiny
from torch import Tensor

from lightning_peft.stack.adapter_files.folder import AdapterError
from lightning_peft.stack.adapter_files.names import README
from lightning_peft.stack.adapter_files.saving import load_adapter, save_adapter
from lightning_peft.stack.stack import stack_of

WEIGHTS, CONFIG, NOTES = "adapter_model.safetensors", "adapter_config.json", "lightning_peft.json"


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path)


def first(tensors: dict[str, Tensor]) -> str:
    return min(tensors)


DAMAGE = {
    "no weights": (
        lambda d: (d / WEIGHTS).unlink(),
        r"is not an adapter folder: it has no adapter_model\.safetensors\.$",
    ),
    "no config": (lambda d: (d / CONFIG).unlink(), r"is not an adapter folder: it has no adapter_config\.json\.$"),
    "truncated weights": (lambda d: truncate(d / WEIGHTS), r"safetensors is truncated or not a safetensors file: "),
    "foreign weights": (
        lambda d: (d / WEIGHTS).write_bytes(b"PK\3\4" * 9),
        r"is truncated or not a safetensors file: ",
    ),
    "empty weights": (lambda d: (d / WEIGHTS).write_bytes(b""), r"is truncated or not a safetensors file: "),
    "truncated config": (lambda d: truncate(d / CONFIG), r"adapter_config\.json is truncated or not JSON: "),
    "config of a list": (
        lambda d: (d / CONFIG).write_text("[1]"),
        r"adapter_config\.json is not what this package writes: it is \[1\], not an object\.$",
    ),
    "config of a method that is none": (
        lambda d: (d / CONFIG).write_text('{"peft_type": [1]}'),
        r"adapter_config\.json is not what this package writes: peft_type is \[1\], not a str\.$",
    ),
    "endless config": (
        lambda d: (d / CONFIG).write_text("[" * 10**5),
        r"adapter_config\.json is truncated or not JSON: ",
    ),
    "unknown method": (
        lambda d: (d / CONFIG).write_text('{"peft_type": "NOVEL"}'),
        r"adapter_config\.json is not a peft configuration: ",
    ),
    "truncated notes": (lambda d: truncate(d / NOTES), r"lightning_peft\.json is truncated or not JSON: "),
    "notes of a list": (
        lambda d: (d / NOTES).write_text("[]"),
        r"lightning_peft\.json is not what this package writes: it is \[\], not an object\.$",
    ),
    "NaN": (
        lambda d: rewrite(d / WEIGHTS, lambda t: t[first(t)].view(-1)[0].fill_(float("nan"))),
        r": base_model\.model\..*head_offsets holds NaN or infinite values\.$",
    ),
    "a tensor too few": (
        lambda d: rewrite(d / WEIGHTS, lambda t: t.pop(first(t))),
        r"do not fit: 1 tensors are missing, the first is base_model\.model\..*o_proj\.head_offsets\.$",
    ),
    "a tensor too many": (
        lambda d: rewrite(d / WEIGHTS, lambda t: t.update(extra=torch.ones(1))),
        r"do not fit: 1 tensors are unknown, the first is extra\.$",
    ),
    "integers": (
        lambda d: rewrite(d / WEIGHTS, lambda t: t.update({first(t): t[first(t)].int()})),
        r"head_offsets holds torch\.int32 where the model has torch\.float32\.$",
    ),
    "another shape": (
        lambda d: rewrite(d / WEIGHTS, lambda t: t.update({first(t): torch.ones(1, 9)})),
        r"head_offsets has shape \(1, 9\), the model needs \(1, 8\)\.$",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_one_sentence_and_leaves_the_model_alone(
    damage: str, tokens: Tensor, tmp_path: Path
) -> None:
    harm, message = DAMAGE[damage]
    save_adapter(edited("llama")[0], tmp_path)
    harm(tmp_path)
    model = tiny("llama")
    names, base = list(model.state_dict()), logits(model, tokens)
    with pytest.raises(AdapterError, match=message) as raised:
        load_adapter(model, tmp_path)
    assert "\n" not in str(raised.value)
    assert list(model.state_dict()) == names and torch.equal(logits(model, tokens), base)
    assert not stack_of(model).parts


ORDERS = {
    '{"parts": ["lora"': "is truncated or not JSON: Expecting ',' delimiter",
    "[]": "is not what this package writes: it is \\[\\], not an object",
    "{}": "is not what this package writes: it has no parts",
    '{"parts": {}}': r"parts is \{\}, not a list",
    '{"parts": [1]}': r"parts\[0\] is 1, not a str",
    '{"parts": []}': r"parts is \[\], not a list of different names",
    '{"parts": ["lora", "lora"]}': "parts is .*, not a list of different names",
    '{"parts": [".."]}': r"parts\[0\] is '..', not a name of letters, digits, - and _",
}


@pytest.mark.parametrize("content", ORDERS)
def test_a_damaged_order_is_one_sentence(content: str, tmp_path: Path) -> None:
    save_adapter(both("llama")[0], tmp_path)
    (tmp_path / "stack.json").write_text(content)
    with pytest.raises(AdapterError, match=r"stack\.json " + f".*{ORDERS[content]}") as raised:
        load_adapter(tiny("llama"), tmp_path)
    assert "\n" not in str(raised.value)


def _places(value: object, path: tuple[object, ...] = ()) -> list[tuple[object, ...]]:
    """The place of every value in nested dicts and lists."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in inner for place in _places(item, (*path, key)))]


@pytest.mark.filterwarnings("ignore")  # some of which hold what no terminal can show
@pytest.mark.parametrize("file", [NOTES, CONFIG])
def test_a_value_of_another_type_is_an_adapter_error_wherever_it_stands(file: str, tmp_path: Path) -> None:
    """One value after the other of what was written is replaced, or loads as before."""
    save_adapter(edited("llama")[0], tmp_path)
    written = (tmp_path / file).read_text()
    model, refused = tiny("llama"), 0
    every = _places(json.loads(written))[1:]
    sampled = [place for place in every if place[:2] == ("fingerprint", "samples")]
    for place in [place for place in every if place not in sampled[6:]]:  # a tensor's samples stand for all
        for wrong in (None, [[1]], {"a": {}}, "\ud800", 10**400, True):
            changed = json.loads(written)
            holder = changed
            for key in place[:-1]:
                holder = holder[key]
            holder[place[-1]] = wrong
            (tmp_path / file).write_text(json.dumps(changed))
            try:
                load_adapter(model, tmp_path)
            except AdapterError as error:
                assert "\n" not in str(error)
                refused += 1
            except ValueError as error:
                assert "\n" not in str(error) and "Traceback" not in str(error)
            for part in list(stack_of(model).parts):
                stack_of(model).remove(part.name)
    assert refused > 20


def test_a_stack_with_one_damaged_part_is_not_loaded_in_part(tokens: Tensor, tmp_path: Path) -> None:
    save_adapter(both("llama")[0], tmp_path)
    rewrite(tmp_path / "edit" / WEIGHTS, lambda t: t[first(t)].fill_(float("inf")))
    model = tiny("llama")
    with pytest.raises(AdapterError, match="holds NaN or infinite values"):
        load_adapter(model, tmp_path)
    assert not stack_of(model).parts and torch.equal(logits(model, tokens), logits(tiny("llama"), tokens))


def test_the_order_of_a_stack_cannot_point_outside_its_folder(tmp_path: Path) -> None:
    save_adapter(both("llama")[0], tmp_path / "saved")
    save_adapter(edited("llama")[0], tmp_path / "outside")
    (tmp_path / "saved" / "stack.json").write_text('{"parts": ["lora", "../outside"]}')
    with pytest.raises(AdapterError, match=r"parts\[1\] is '../outside', not a name of letters"):
        load_adapter(tiny("llama"), tmp_path / "saved")


def test_a_failed_write_leaves_the_old_adapter_as_it_was(
    tmp_path: Path, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, stack = edited("llama")
    save_adapter(model, tmp_path)
    old = logits(model, tokens)
    fill(stack, "edit", seed=9)

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(safetensors.torch, "save_file", fail)
        save_adapter(model, tmp_path)
    again = tiny("llama")
    load_adapter(again, tmp_path)
    assert torch.equal(logits(again, tokens), old)
    assert {path.name for path in tmp_path.iterdir()} == {WEIGHTS, CONFIG, NOTES, README}


def test_one_adapter_over_a_stack_and_a_stack_over_one(tmp_path: Path, tokens: Tensor) -> None:
    """What is loaded is what was saved last."""
    for model in (both("llama")[0], edited("llama")[0], both("llama")[0]):
        save_adapter(model, tmp_path)
        again = tiny("llama")
        load_adapter(again, tmp_path)
        assert torch.equal(logits(again, tokens), logits(model, tokens))
    assert not (tmp_path / CONFIG).exists()


def test_notes_say_how_it_was_made_and_on_what_base(tmp_path: Path) -> None:
    model = tiny("llama")
    stack = add_lora(model, ["q_proj"])
    stack["lora"].record = {"note": 1}
    save_adapter(model, tmp_path)
    notes = json.loads((tmp_path / NOTES).read_text())
    assert notes["record"] == {"note": 1} and notes["computed"] is False
    assert notes["fingerprint"]["model_type"] == "llama"
    assert json.loads((tmp_path / CONFIG).read_text())["inference_mode"] is True


def test_a_folder_without_notes_loads_as_any_peft_folder(tmp_path: Path, tokens: Tensor) -> None:
    model, _ = edited("llama")
    save_adapter(model, tmp_path)
    (tmp_path / NOTES).unlink()
    again = tiny("llama")
    load_adapter(again, tmp_path)
    assert torch.equal(logits(again, tokens), logits(model, tokens))


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"nowhere is not an adapter folder: it has no adapter_config\.json\.$"):
        load_adapter(tiny("llama"), tmp_path / "nowhere")
