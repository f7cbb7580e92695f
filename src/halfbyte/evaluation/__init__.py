"""Measuring: what quantization, training and merging did to a model."""
