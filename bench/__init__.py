"""Benchmarks: micro (test_*.py, pytest-benchmark) and the whole chain (chain.py)."""
