"""Adapters: what to adapt, the factors, and the files that PEFT shares with us."""
