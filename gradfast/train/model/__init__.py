"""What is trained, and by what."""
