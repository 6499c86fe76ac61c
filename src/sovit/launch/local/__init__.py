"""The cells of a sweep on this machine: a process each, every cell exactly once."""
