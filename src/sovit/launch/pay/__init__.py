"""What a sweep will take before it starts: this machine timed, hours and money."""
