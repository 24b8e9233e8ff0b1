"""What is measured of a trained policy."""
