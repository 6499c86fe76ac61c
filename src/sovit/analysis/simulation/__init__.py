"""Whole sweeps drawn from a known law, as ordinary records: `sovit simulate`."""
