"""From a sweep file to finished runs: cells (sweep), their cost (plan), processes (local), what a person sees (display)."""
