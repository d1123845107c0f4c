"""How peft's methods are put on a backbone that stays the same object."""
