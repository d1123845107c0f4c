"""Adapters that the library AdapterHub `adapters` saved, translated into this package's folders."""
