"""Benchmarks: versioned requests plus the rule that turns pictures into numbers."""
