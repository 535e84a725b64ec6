"""Measures serving: one model, the same prompts, and engines that answer one, eight and 32 clients at once."""
