"""Building blocks of a decoder: linears by handle, LoRA, norm, rotary, attention, loss."""
