"""Texts with common beginnings, computed once."""
