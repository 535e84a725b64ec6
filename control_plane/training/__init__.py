"""Training engine: recipes that run as child processes, and what they share. Importing this imports nothing else."""
