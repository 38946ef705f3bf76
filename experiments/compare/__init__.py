"""Methods side by side over the same texts: what runs, its folder, tables and pictures.

What may change here: which settings vary (`sweep.py`, which also names runs) and what is shown of them.
"""
