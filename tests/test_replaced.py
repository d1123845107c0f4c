"""A method replaced on one instance, and given back."""

from __future__ import annotations

import copy
import inspect
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning import LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

from lightning_peft.replaced import KeptAttribute, replaced, replaced_attribute, replacements


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return scale * self.linear(x)


class Adds:
    """Adds its number to what the call gives; it can be copied and pickled."""

    def __init__(self, number: float) -> None:
        self.number = number

    def around(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs) + self.number


X = torch.ones(1, 2)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("foreign", [None, 0, 1, 2, 3])
def test_replacements_come_off_in_any_order(order: tuple[int, ...], foreign: int | None) -> None:
    model = Model()
    base = model(X)
    handles, numbers = [], [1.0, 10.0, 100.0]
    expected = 0.0
    for i, number in enumerate([*numbers, 0.0]):
        if foreign == i:  # somebody else wraps whatever stands there
            before = model.forward
            model.forward = lambda *a, _before=before, **k: _before(*a, **k) + 1000.0
            expected += 1000.0
        if number:
            handles.append(replaced(model, "forward", Adds(number).around))
            expected += number
    assert torch.equal(model(X), base + expected) or torch.allclose(model(X), base + expected)
    for i in order:
        handles[i].remove()
        handles[i].remove()
        expected -= numbers[i]
        torch.testing.assert_close(model(X), base + expected)
    if foreign is None:
        assert "forward" not in vars(model)


def test_what_was_on_the_instance_is_called_and_comes_back() -> None:
    model, calls = Model(), []
    model.forward = own = lambda x: calls.append("own") or x  # type: ignore[method-assign, assignment]
    with replaced(model, "forward", Adds(1).around):
        assert torch.equal(model(X), X + 1) and calls == ["own"]
    assert vars(model)["forward"] is own
    with replaced(model, "forward", lambda x: 3 * x, instead=True):
        assert torch.equal(model(X), 3 * X) and calls == ["own"]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_of_the_owner_has_replacements_of_its_own(duplicate: Callable[[Any], Any]) -> None:
    model = Model()
    handle = replaced(model, "forward", Adds(1).around)
    twin = duplicate(model)
    assert vars(twin)["forward"].owner is twin
    with torch.no_grad():
        twin.linear.weight.zero_()
        twin.linear.bias.zero_()
    assert torch.equal(twin(X), torch.ones(1, 2)) and not torch.equal(model(X), twin(X))
    handle.remove()
    assert torch.equal(twin(X), torch.ones(1, 2))
    vars(twin)["forward"].remove()
    assert torch.equal(twin(X), torch.zeros(1, 2))


def test_the_signature_is_that_of_the_method() -> None:
    model = Model()
    with replaced(model, "forward", Adds(1).around), replaced(model, "forward", Adds(1).around):
        assert list(inspect.signature(model.forward).parameters) == ["x", "scale"]


def test_lightning_sees_whether_the_method_is_overridden() -> None:
    class Mine(LightningModule):
        def setup(self, stage: str) -> None: ...

    module = Mine()
    around = lambda original, *args: original(*args)  # noqa: E731
    with replaced(module, "setup", around), replaced(module, "setup", around):
        assert is_overridden("setup", module)
    with replaced(module, "configure_model", around):
        assert not is_overridden("configure_model", module)


def test_a_method_that_is_passed_on_by_a_wrapper_can_be_replaced() -> None:
    class Wrapper:
        def __init__(self) -> None:
            self.inner = Model()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

    wrapper = Wrapper()
    base = wrapper.forward(X)
    with replaced(wrapper, "forward", Adds(1).around):
        torch.testing.assert_close(wrapper.forward(X), base + 1)


def test_a_method_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="generate"):
        replaced(Model(), "generate", Adds(1).around)


def test_an_attribute_comes_back_unless_somebody_has_set_it_since() -> None:
    model = Model()
    with replaced_attribute(model, "mode", "a"):
        assert model.mode == "a"
    assert "mode" not in vars(model)
    model.mode = "b"
    with replaced_attribute(model, "mode", "c"):
        pass
    assert model.mode == "b"
    with replaced_attribute(model, "mode", "d"):
        model.mode = "e"
    assert model.mode == "e"


def test_a_kept_attribute_comes_back_whatever_was_set_since() -> None:
    model = Model()
    model.mode = "a"
    with KeptAttribute(model, "mode"), KeptAttribute(model, "other"):
        model.mode, model.other = "b", "c"
    assert model.mode == "a" and "other" not in vars(model)


def test_what_acts_once_comes_off_when_it_is_called() -> None:
    model = Model()
    base = model(X)
    replaced(model, "forward", Adds(1).around, once=True)
    replaced(model, "forward", Adds(10).around, once=True)
    torch.testing.assert_close(model(X), base + 11)
    assert torch.equal(model(X), base) and "forward" not in vars(model)


def test_replacements_are_found_by_what_makes_them() -> None:
    def other(original: Callable[..., Any], *args: Any) -> Any:
        return original(*args)

    model = Model()
    lower = replaced(model, "forward", Adds(1).around)
    plain = replaced(model, "forward", other)
    upper = replaced(model, "forward", Adds(2).around)
    assert replacements(model, "forward", Adds) == [upper, lower]
    assert replacements(model, "forward", other) == [plain]
    assert replacements(model, "generate", Adds) == []
