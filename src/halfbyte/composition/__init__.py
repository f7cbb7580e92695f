"""Combining adapters: expressions, factored algebra, and weights that are found."""
