"""Does the predicted shape win? Its rivals at the same compute, what they measured, and the report: `sovit optimize`."""
