"""Plans of comparisons and sweeps as they were before there were tasks: a model and its questions at the top."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from lightning_peft.moved import resolve, warn_moved

C = TypeVar("C", bound=type)
_DATA = "lightning_peft.truthfulqa.settings.Data"
# modules whose classes stand in plans, as release 68ae323 had them
IN_THE_FIRST_RELEASE = {"lightning_peft.tasks.decoding": "lightning_peft.compare.scoring"}


def keep_old_plans(*order: str) -> Callable[[C], C]:
    """Let a plan of a task also take `model`, `data` and `dtype`, which mean the benchmark's task; makes a decorator.

    In Python they may stand by position, as they did; in YAML and on the command line they are options of their own.

    Args:
        *order: the arguments in their order in 0.1.
    """
    return functools.partial(_keep_old_plans, order=order)


def _keep_old_plans(cls: C, order: tuple[str, ...]) -> C:
    untyped: Any = cls
    init = untyped.__init__
    parameters = inspect.signature(init).parameters
    place = list(parameters).index("task") - 1  # among positional arguments

    @functools.wraps(init)
    def translated(self: object, *args: Any, **kwargs: Any) -> None:
        if len(args) > 1 and isinstance(args[1], str):
            kwargs = dict(zip(order, args, strict=False)) | kwargs
            args = ()
        given = {name: kwargs.pop(name) for name in ("model", "data", "dtype") if name in kwargs}
        old = {name: value for name, value in given.items() if value is not None}
        if old:
            if kwargs.pop("task", None) is not None or len(args) > place:
                raise ValueError(f"A plan has a task or, as in 0.1, {' and '.join(old)}: give all of it to the task.")
            if "model" not in old:
                raise ValueError(f"A plan without a task needs a model beside {', '.join(old)}.")
            warn_moved(f"{cls.__name__}(model=…, data=…, dtype=…)", f"{cls.__name__}(task=TruthfulQA(model=…, …))")
            data = old.pop("data", None) or resolve(_DATA)()
            kwargs["task"] = data.task(**old)
        elif kwargs.get("task") is None and len(args) <= place:
            raise ValueError("A plan needs a task, what it measures on: task: {class_path: …, init_args: …}.")
        init(self, *args, **kwargs)

    translated.__annotations__ = init.__annotations__ | {"model": str | None, "dtype": str | None}
    translated.__annotations__ |= {"data": resolve(_DATA) | None}
    keyword = inspect.Parameter.KEYWORD_ONLY
    optional = {name: p.replace(kind=keyword) for name, p in parameters.items() if name != "self"}
    optional["task"] = optional["task"].replace(default=None)
    for name in ("model", "data", "dtype"):
        optional[name] = inspect.Parameter(name, keyword, default=None, annotation=translated.__annotations__[name])
    signature = inspect.Signature([parameters["self"], *optional.values()])
    vars(translated)["__signature__"] = signature
    untyped.__init__ = translated
    return cls
