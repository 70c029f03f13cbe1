"""VAEs cut by rows: encoder and decoder of `AutoencoderKL`."""
