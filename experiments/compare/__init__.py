"""Methods side by side over the same texts: what runs, its folder, tables and pictures."""
