"""Evaluating a served model over its OpenAI-shaped endpoint, as a child process. Suites that need no server are in
``exporters.evaluate``.
"""
