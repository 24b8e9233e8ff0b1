"""One forward pass for both stages: packing, attention, log-probs, pooled features."""
