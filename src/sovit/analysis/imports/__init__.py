"""Runs made elsewhere, from W&B or a table, as ordinary records: `sovit import`."""
