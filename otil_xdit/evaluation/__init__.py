"""Measuring quality: matrices of runs, metrics, reports, the paper's selection study."""
