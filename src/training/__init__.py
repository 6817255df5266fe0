"""One run: planned, built from its parts, driven step by step."""
