"""Replace a method or an attribute of one instance, and take the replacement off again, in whatever order."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import TracebackType
from typing import Any

_MISSING: Any = inspect.Parameter.empty  # a class, so that copies and pickles of a link still know it


class Handle:
    """A replacement that can be taken off; a context manager that does so at its end."""

    def remove(self) -> None:
        """Take the replacement off; what was there before acts again. A second time does nothing."""
        raise NotImplementedError

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.remove()


class ReplacedMethod(Handle):
    """A callable in a method's place on an instance: it passes each call on to `by`, with what was there before.

    It is copied and pickled with its owner, has the signature of the method it replaces, and several may stand on one
    another: whichever is removed, the others keep acting.
    """

    def __init__(self, owner: Any, name: str, by: Callable[..., Any], instead: bool, once: bool) -> None:
        self.owner, self.name, self.by, self.instead, self.once = owner, name, by, instead, once
        self.below = owner.__dict__.get(name, _MISSING)  # what stood on the instance; missing: the class's method
        self.acting = True

    @property
    def original(self) -> Callable[..., Any]:
        """The method that would be called were this one not there."""
        return _class_attribute(self.owner, self.name) if self.below is _MISSING else self.below

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        # Lightning unwraps once to see whether a hook is overridden, so this is the innermost
        return self.below.__wrapped__ if isinstance(self.below, ReplacedMethod) else self.original

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.__wrapped__)  # transformers asks which arguments a model takes

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.acting:
            return self.original(*args, **kwargs)
        if self.once:
            self.remove()
        return self.by(*args, **kwargs) if self.instead else self.by(self.original, *args, **kwargs)

    def remove(self) -> None:
        self.acting = False  # somebody else may have wrapped it since; it then stays, as a passage
        above, top = None, self.owner.__dict__.get(self.name)
        while isinstance(top, ReplacedMethod) and top is not self:
            above, top = top, top.below
        if top is not self:
            return
        if above is not None:
            above.below = self.below
        elif self.below is _MISSING:
            del self.owner.__dict__[self.name]
        else:
            self.owner.__dict__[self.name] = self.below


class KeptAttribute(Handle):
    """An instance's attribute as it is now; `remove()` brings it back, whatever others have set since."""

    def __init__(self, owner: Any, name: str) -> None:
        self.owner, self.name = owner, name
        self.before = owner.__dict__.get(name, _MISSING)

    def remove(self) -> None:
        self.owner.__dict__.pop(self.name, None)
        if self.before is not _MISSING:
            self.owner.__dict__[self.name] = self.before


class ReplacedAttribute(KeptAttribute):
    """A value that stands on an instance in place of another, or of the class's."""

    def __init__(self, owner: Any, name: str, value: Any) -> None:
        super().__init__(owner, name)
        self.value = owner.__dict__[name] = value

    def remove(self) -> None:
        if self.owner.__dict__.get(self.name, _MISSING) is self.value:  # else somebody has set it since
            super().remove()


def replaced(
    owner: Any, name: str, by: Callable[..., Any], instead: bool = False, once: bool = False
) -> ReplacedMethod:
    """Replace a method on one instance.

    Args:
        owner: the instance; its class is not changed.
        name: the method's name.
        by: called as `by(original, *args, **kwargs)`, where `original` is what was there, the class's method or what
            somebody had put on the instance. A bound method of an object that can be copied, if `owner` is copied.
        instead: call `by(*args, **kwargs)`, and what was there not at all.
        once: the replacement comes off when it is called.

    Returns:
        A handle: `remove()` takes the replacement off, in any order among several.

    Raises:
        AttributeError: the owner has no such method.

    Example:
        >>> class Model:
        ...     def forward(self, x): return x + 1
        >>> model = Model()
        >>> double = replaced(model, "forward", lambda original, x: 2 * original(x))
        >>> negate = replaced(model, "forward", lambda original, x: -original(x))
        >>> model.forward(1)
        -4
        >>> double.remove()
        >>> model.forward(1)
        -2
        >>> negate.remove()
        >>> model.forward(1), vars(model)
        (2, {})
    """
    getattr(owner, name)
    link = owner.__dict__[name] = ReplacedMethod(owner, name, by, instead, once)
    return link


def replacements(owner: Any, name: str, by: Callable[..., Any] | type) -> list[ReplacedMethod]:
    """Return the replacements of an instance's method by this function or a method of this class; uppermost first."""
    links, top = [], owner.__dict__.get(name)
    while isinstance(top, ReplacedMethod):
        if top.by is by or (isinstance(by, type) and isinstance(getattr(top.by, "__self__", None), by)):
            links.append(top)
        top = top.below
    return links


def replaced_attribute(owner: Any, name: str, value: Any) -> ReplacedAttribute:
    """Set an attribute on one instance; `remove()` brings back what was there, unless somebody has set it since."""
    return ReplacedAttribute(owner, name, value)


def _class_attribute(owner: Any, name: str) -> Any:
    """Return what the owner's class has under a name, bound to the owner, whatever stands on the instance."""
    for cls in type(owner).__mro__:
        if name in cls.__dict__:
            method = cls.__dict__[name]
            return method.__get__(owner, type(owner)) if hasattr(method, "__get__") else method
    return type(owner).__getattr__(owner, name)  # a wrapper that passes attributes on
