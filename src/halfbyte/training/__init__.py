"""Learning: one loop from a data file to a trained adapter."""
