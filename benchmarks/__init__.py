"""Measures the engine beside its peers."""
