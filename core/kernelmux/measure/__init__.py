"""What this machine does: its ceilings, and how long kernels take."""
