"""The literature's own numbers, read again with this package: `sovit published`."""
