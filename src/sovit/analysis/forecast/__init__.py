"""From exponents and an origin to the shape for a budget: `sovit predict`."""
