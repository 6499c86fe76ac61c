"""What a shape costs in use, measured: `sovit bench`. A model of these costs is in `sovit.analysis.latency`."""
