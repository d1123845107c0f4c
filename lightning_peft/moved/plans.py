"""Plans of comparisons as they were before there were tasks: a model and its questions at the top."""

from __future__ import annotations

import functools
import inspect
from typing import Any, TypeVar

from lightning_peft.moved import resolve, warn_moved

C = TypeVar("C", bound=type)
_DATA = "lightning_peft.truthfulqa.settings.Data"
# modules whose classes stand in plans, as release 68ae323 had them
IN_THE_FIRST_RELEASE = {"lightning_peft.truthfulqa.decoding": "lightning_peft.compare.scoring"}
# the order of arguments in release 0.1
_OLD = ("name", "model", "rows", "data", "output", "seed", "dtype", "accelerator")


def keep_old_plans(cls: C) -> C:
    """Let a plan of a task also take `model`, `data` and `dtype`, which mean the benchmark's task; a decorator.

    In Python they may stand by position, as they did; in YAML and on the command line they are options of their own.
    """
    untyped: Any = cls
    init = untyped.__init__
    parameters = inspect.signature(init).parameters

    @functools.wraps(init)
    def translated(self: object, *args: Any, **kwargs: Any) -> None:
        if len(args) > 1 and isinstance(args[1], str):
            kwargs = dict(zip(_OLD, args, strict=False)) | kwargs
            args = ()
        given = {name: kwargs.pop(name) for name in ("model", "data", "dtype") if name in kwargs}
        old = {name: value for name, value in given.items() if value is not None}
        if old:
            if kwargs.pop("task", None) is not None or len(args) > 2:
                raise ValueError(f"A plan has a task or, as in 0.1, {' and '.join(old)}: give all of it to the task.")
            if "model" not in old:
                raise ValueError(f"A plan without a task needs a model beside {', '.join(old)}.")
            warn_moved("Plan(model=…, data=…, dtype=…)", "Plan(task=TruthfulQA(model=…, …))")
            data = old.pop("data", None) or resolve(_DATA)()
            kwargs["task"] = data.task(**old)
        elif kwargs.get("task") is None and len(args) < 3:
            raise ValueError("A plan needs a task, what its rows are compared on: task: {class_path: …, init_args: …}.")
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
