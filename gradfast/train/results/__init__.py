"""What a run tells and leaves behind, and what it goes on from."""
