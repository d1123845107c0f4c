"""Small random models of several architectures."""

from __future__ import annotations

from lightning_peft.testing.models import LANGUAGE_MODELS, VOCABULARY, tiny

__all__ = ["LANGUAGE_MODELS", "VOCABULARY", "tiny"]
