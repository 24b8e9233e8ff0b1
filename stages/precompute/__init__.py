"""Stage one: the worker that writes a shard, and what a cache says of how it was made."""
