"""The adapters on one backbone: the stack, how each is put on, its files, its registration with peft."""
