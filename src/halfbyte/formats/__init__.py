"""What the bytes mean: codebooks, 4-bit tensors, and the files that hold them."""
