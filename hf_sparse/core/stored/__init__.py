"""What lies on disk: config entries, packed weights, JSON, whole files."""
