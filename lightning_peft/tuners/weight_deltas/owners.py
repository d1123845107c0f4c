"""Find the module that owns each parameter, as the model is without adapters."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from lightning_peft.backbone.modules import base_modules, is_matrix


@dataclass(frozen=True, eq=False)
class Place:
    """A parameter where one module owns it.

    Args:
        full_name: as the model without adapters calls it.
        owner: the module.
        name: the module's own name for it.
        parameter: itself; None for a bias that the module could have and has not.
    """

    full_name: str
    owner: nn.Module
    name: str
    parameter: nn.Parameter | None


def places(backbone: nn.Module, missing: bool = False) -> list[list[Place]]:
    """Return every parameter of the backbone, adapters' left out, in order.

    Args:
        backbone: any module, with or without adapters.
        missing: also the biases that linear layers and convolutions could have and have not.

    Returns:
        For each parameter, the places where it stands: several where modules share it.
    """
    by_parameter: dict[int, list[Place]] = {}
    for module_name, owner in base_modules(backbone):
        for name, parameter in owner._parameters.items():
            full_name = f"{module_name}.{name}" if module_name else name
            place = Place(full_name, owner, name, parameter)
            if parameter is not None:
                by_parameter.setdefault(id(parameter), []).append(place)
            elif missing and name == "bias" and is_matrix(owner):
                by_parameter[id(place)] = [place]
    return list(by_parameter.values())
