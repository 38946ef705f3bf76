"""The ground floor: flags and texts in; tables, files and progress out; estimates; where results are from.

What may change here: what several rooms need, and no room's own matter.
"""
