"""Pictures: panels, the words on them, and the files that they become."""
