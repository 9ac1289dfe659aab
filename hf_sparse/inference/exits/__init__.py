"""Ways out: a compressed model made smaller for good, or written for other engines."""
