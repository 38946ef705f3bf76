"""What this process computes on: its devices, their memory, compiled programs.

What may change here: what is asked of devices and of JAX; nothing here knows of commands.
"""
