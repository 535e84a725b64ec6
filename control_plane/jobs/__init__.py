"""Work that runs in the worker process."""
