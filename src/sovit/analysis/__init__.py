"""From the records of a sweep to shapes: the law, its fit, how sure the exponent is, and what speaks against it."""
