"""Images: the embedded fractals and digits, and the loaders that make batches of them."""
