"""What this process computes on: its devices, their memory, compiled programs."""
