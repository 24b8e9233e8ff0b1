"""One file a command, and what commands share."""
