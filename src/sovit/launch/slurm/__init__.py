"""The cells of a sweep as a Slurm job array."""
