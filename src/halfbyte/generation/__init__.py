"""Talking: key-value cache, sampling, streaming, and the model object of `halfbyte.load`."""
