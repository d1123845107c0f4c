"""PEFT methods that huggingface/peft lacks, and the stack that holds several methods on one backbone."""
