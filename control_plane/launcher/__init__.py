"""Starts and stops an installation on one machine: preflight, Triton, the starter model, the supervised processes."""
