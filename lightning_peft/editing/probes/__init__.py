"""Probes for many heads at once: classifiers of one head's output, fitted together, in the manner of scikit-learn."""

from lightning_peft.editing.probes.ccs import CCSProbes
from lightning_peft.editing.probes.linear import LinearProbes
from lightning_peft.editing.probes.logistic import LogisticProbes

__all__ = ["CCSProbes", "LinearProbes", "LogisticProbes"]
