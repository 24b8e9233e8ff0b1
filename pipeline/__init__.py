"""What a person touches: the command line, the run configuration and its profiles."""
