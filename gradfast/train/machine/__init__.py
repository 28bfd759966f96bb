"""Where a run computes: device, precision, processes."""
