"""What happens within decode steps: pages that queries share, and what a window corrects.

What may change here: what is looked at. Steps are the library's own.
"""
