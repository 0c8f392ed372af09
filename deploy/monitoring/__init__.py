"""What is measured of a running system, and who is told."""
