"""Whole or not at all: atomic directories, manifests, fingerprints, locks."""
