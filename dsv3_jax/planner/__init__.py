"""What a configuration costs before it runs: pure Python, so that it answers at once and anywhere."""
