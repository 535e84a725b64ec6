"""One script per way of training; each prints JSON-lines events. Importing this imports nothing else."""
