"""One page from the folders of runs: tables, pictures, and the paper's figures beside them.

What may change here: what is shown of results that are there; nothing is computed anew.
"""
