"""Notice adapters that training never reaches: their layers are not called, or not for the loss."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn

PATIENCE = 50  # steps after which a parameter that backward has never reached is named


class Reached:
    """The parameters of an adapter that were on no backward graph yet; zero gradients count as reached.

    A parameter may rest where modules are drawn or routed to: it is not reported if the parameter of the same name in
    another module of a numbered list inside a block, such as another expert, was reached.

    Args:
        parameters: the trained parameters by name.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._waiting = dict(parameters)
        self._reached: set[str] = set()
        self._steps = 0

    def wait_for(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Expect further parameters to be reached from now on; those that were are not waited for again."""
        self._waiting |= {name: p for name, p in parameters.items() if name not in self._reached}

    def look(self) -> None:
        """Forget the parameters that have a gradient now; call it after backward. Free once all have had one."""
        if self._waiting:
            self._steps += 1
            reached = {name for name, parameter in self._waiting.items() if parameter.grad is not None}
            self._reached |= reached
            self._waiting = {name: p for name, p in self._waiting.items() if name not in reached}

    def unreached(self) -> list[str]:
        """Return the names of parameters that no backward has reached, except those that may rest."""
        reached = {pattern for name in self._reached for pattern in _patterns(name)}
        return [name for name in self._waiting if not reached & set(_patterns(name))]

    def report(self, adapter: str) -> None:
        """Report the parameters that were never reached, once; report nothing where backward never ran.

        Args:
            adapter: the adapter's name in messages.

        Raises:
            ValueError: nothing was reached at all.
        """
        if not self._steps:
            return
        unreached, self._waiting = self.unreached(), {}
        if not unreached:
            return
        phrase = f"of the {len(unreached)} parameters of {adapter} that backward has not reached in {self._steps} steps"
        advice = "the layers that hold them are not called, or the loss does not depend on them"
        if not self._reached:
            raise ValueError(f"Adapter {adapter} trains to nothing: the first {phrase} is {unreached[0]}; {advice}.")
        rank_zero_warn(f"The first {phrase} is {unreached[0]}; {advice}: leave them out of the target modules.")


def _patterns(name: str) -> Iterable[str]:
    """Return copies of a name, with each number but the first, the block's, left open in turn."""
    numbers = list(re.finditer(r"(?<=\.)\d+(?=\.)", name))[1:]
    return [f"{name[: number.start()]}*{name[number.end() :]}" for number in numbers]
