"""The classes that put peft's methods on a backbone, which stays the same object."""
