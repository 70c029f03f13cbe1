"""The top floor: the only place that imports xfuser."""
