"""The cache on disk: what stage one writes and stage two reads. Knows pyarrow and numpy, nothing of torch."""
