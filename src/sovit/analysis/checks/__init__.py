"""What speaks against the answer of a sweep: `sovit check`."""
