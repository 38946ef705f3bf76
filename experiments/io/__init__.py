"""The ground floor: flags and texts in; tables, files and progress out; estimates; where results are from."""
