"""The base classes for methods of your own; they are defined in `lightning_peft.fitting`."""

from lightning_peft.fitting.adapter_callback import AdapterCallback
from lightning_peft.fitting.edit import Edit
from lightning_peft.fitting.peft import PEFT
from lightning_peft.fitting.reading_edit import ReadingEdit

__all__ = ["PEFT", "AdapterCallback", "Edit", "ReadingEdit"]
