"""The demo: from drawn videos to a LoRA of a concept that the tiny Wan has never seen, by the commands a user runs."""
