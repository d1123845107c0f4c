"""Probes for many heads at once: classifiers of one head's output, fitted together, in the manner of scikit-learn."""

from lightning_peft.editing.probes.ccs import CCSProbes
from lightning_peft.editing.probes.closed_form import LDAProbes, MassMeanProbes, RidgeProbes
from lightning_peft.editing.probes.linear import LinearProbes, Probes
from lightning_peft.editing.probes.logistic import LogisticProbes
from lightning_peft.editing.probes.mlp import MLPProbes
from lightning_peft.editing.probes.validation import (
    PermutationNull,
    ProbeReport,
    Stability,
    cross_validate,
    permutation_null,
    top_k_stability,
)

__all__ = [
    "CCSProbes",
    "LDAProbes",
    "LinearProbes",
    "LogisticProbes",
    "MLPProbes",
    "MassMeanProbes",
    "PermutationNull",
    "ProbeReport",
    "Probes",
    "RidgeProbes",
    "Stability",
    "cross_validate",
    "permutation_null",
    "top_k_stability",
]
