"""Plans of 0.1: a model and questions in place of a task."""

from __future__ import annotations

import argparse
import functools
import inspect
from collections.abc import Callable
from dataclasses import asdict, fields
from typing import Any, TypeVar

from lightning_peft.moved import resolve, warn_moved

C = TypeVar("C", bound=type)

_TASK = "lightning_peft.truthfulqa.task.TruthfulQA"
_OLD = ("model", "data", "dtype")
_DEFAULT_DTYPE = "float32"


def keep_old_plans(data: type) -> Callable[[C], C]:
    """Let the class of a plan take `model`, `data` and `dtype`, as in 0.1, in place of its second argument, `task`.

    Args:
        data: the dataclass that the questions were given in.
    """

    def decorate(cls: C) -> C:
        untyped: Any = cls
        path, init = f"{cls.__module__}.{cls.__qualname__}", untyped.__init__

        @functools.wraps(init)
        def translated(self: object, *args: object, **kwargs: Any) -> None:
            if len(args) > 1 and isinstance(args[1], str):  # by position: name, model, the others, data among them
                questions = [arg for arg in args if isinstance(arg, data)]
                kwargs |= dict(zip(["data"], questions, strict=False))
                others = [arg for arg in args if not isinstance(arg, data)]
                names = ["name", "model", *list(inspect.signature(init).parameters)[3:]]  # in place of the task
                kwargs |= dict(zip(names, others, strict=False))
                args = ()
            old = {name: kwargs.pop(name) for name in _OLD if name in kwargs}
            if old:
                if "task" in kwargs:
                    raise ValueError(f"{cls.__name__} was given a task and {', '.join(old)}: they belong to the task.")
                warn_moved(f"{path}(model=…, data=…)", f"{path}(task={_TASK}(model=…, …))")
                kwargs["task"] = _task(cls.__name__, data, old)
            elif len(args) < 2 and "task" not in kwargs:
                raise ValueError(f"{cls.__name__} needs a task, such as {_TASK}.")
            init(self, *args, **kwargs)

        vars(translated)["__signature__"] = _with_old(inspect.signature(init), data)
        translated.__annotations__ = init.__annotations__ | {"model": str, "data": data | None, "dtype": str}
        untyped.__init__ = translated
        return cls

    return decorate


def settings_before(task: Any) -> dict[str, Any] | None:
    """Return a task's part of what a plan of 0.1 was hashed as; None of a task that there was not.

    By it what 0.1 had finished still counts.
    """
    if type(task) is not resolve(_TASK):  # a subclass may do otherwise
        return None
    data = {name: getattr(task, name) for name in ("source", "limit", "val_fraction", "seed", "protocol")}
    data |= {"num_folds": task.folds, "side_effects": asdict(task.side_effects)}
    if task.fit_window:  # which came later
        data["fit_window"] = True
    return {"model": task.model, "dtype": task.dtype, "data": data}


def _task(plan: str, kind: type, old: dict[str, Any]) -> object:
    if "model" not in old:
        raise ValueError(f"{plan} was given {', '.join(old)} and no model: give a task with all of them.")
    data: Any = old.get("data") or kind()
    values = {field.name: getattr(data, field.name) for field in fields(data)}
    return resolve(_TASK)(model=old["model"], dtype=old.get("dtype", _DEFAULT_DTYPE), **values)


def _with_old(signature: inspect.Signature, data: type) -> inspect.Signature:
    """Return the signature that jsonargparse reads, all by keyword: what is not given stays out of what it saves."""
    by_keyword, not_given = inspect.Parameter.KEYWORD_ONLY, argparse.SUPPRESS
    own = list(signature.parameters.values())
    parameters = [own[0], *(parameter.replace(kind=by_keyword) for parameter in own[1:])]
    parameters = [p.replace(default=not_given) if p.name == "task" else p for p in parameters]
    for name, annotation in (("model", str), ("data", data | None), ("dtype", str)):
        parameters.append(inspect.Parameter(name, by_keyword, default=not_given, annotation=annotation))
    return inspect.Signature(parameters)
