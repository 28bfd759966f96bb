"""The settings of a training run, a file for each group of them, and what they are made of in `field`."""
