"""What happens within decode steps: pages that queries share, and what a window corrects."""
