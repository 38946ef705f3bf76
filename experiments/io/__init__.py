"""The ground floor: flags and texts in; progress, tables and files out; estimates, and where they come from."""
