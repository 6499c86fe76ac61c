"""What the downstream tasks count: plain functions of arrays, with their intervals. Loads no torch."""
