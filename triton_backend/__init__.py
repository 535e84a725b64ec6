"""The inference engine that runs inside Triton: continuous batching over an ONNX decoder.

Only ``protocol``, ``config`` and ``version_folder`` may be imported from outside; they need nothing but the
standard library. Everything else is reached through Triton's API or ``python -m triton_backend``.
"""
