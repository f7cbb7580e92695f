"""Decoders: config, families as data, one decoder for all, and stores for its weights."""
