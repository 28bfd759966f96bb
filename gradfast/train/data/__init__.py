"""From the setting ``--data`` to batches of images."""
