"""The vision transformer that is swept."""
