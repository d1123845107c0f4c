"""Configurations of LoRA that change the base as well, so that adapter and base only make sense together."""

from __future__ import annotations

from typing import Any

# PiSSA (arXiv:2404.02948), OLoRA (2406.01775), CorDA (2406.05223), LoftQ (2310.08659), LoRA-GA (2407.05000)
_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")


def changes_base(config: Any) -> bool:
    """Return whether this adapter changes the model's own weights, or how often its layers run."""
    return bool(_change(config))


def begins_in_weights(config: Any) -> bool:
    """Return whether a LoRA took its beginning out of the base's weights in a way that these alone tell again."""
    init = getattr(config, "init_lora_weights", None)
    return isinstance(init, str) and init.lower() in ("pissa", "olora") and not config.layer_replication


def check_repeatable(config: Any) -> None:
    """Raise `ValueError` where loading the adapter could not change the base as it was changed when it was made."""
    init = getattr(config, "init_lora_weights", None)
    if isinstance(init, str) and init.startswith("pissa_niter_"):
        raise ValueError(
            f"init_lora_weights={init!r} changes the base by a decomposition drawn at random, which no saved adapter "
            "can repeat: use 'pissa'."
        )


def check_undoable(config: Any, name: str, what: str) -> None:
    """Raise `ValueError` where the base cannot be restored.

    Args:
        config: the adapter's configuration.
        name: the adapter's name.
        what: the operation, e.g. `"switched off"`.
    """
    if changes_base(config):
        raise ValueError(
            f"Adapter {name!r} was made by changing the base itself ({_change(config)}), so it cannot be {what}: build "
            "the model anew."
        )


def _change(config: Any) -> str:
    """Return the setting that changes the base; empty where none does."""
    init = getattr(config, "init_lora_weights", None)
    if isinstance(init, str) and init.lower().startswith(_CHANGING):
        return f"init_lora_weights={init!r}"
    if getattr(config, "layer_replication", None):  # LoRA on a model in which some layers run several times
        return f"layer_replication={config.layer_replication!r}"
    return ""
