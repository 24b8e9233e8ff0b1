"""The embedded world: its tasks, and the making of its model and SAEs."""
