"""Where a sweep stands, also while it runs: `sovit status`."""
