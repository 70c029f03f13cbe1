"""U-Nets cut by rows: the layers that look beyond a patch, and the whole network."""
