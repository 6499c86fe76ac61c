"""Sweeps through W&B, and records sent there or fetched from there."""
