"""DiT models: the attention seam, and telling which layer calls it."""
