"""What runs on every rank of `xfuser serve`: load the model once, then make the images that rank 0 is asked for."""
