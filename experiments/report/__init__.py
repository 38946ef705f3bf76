"""One page from the folders of runs: tables, pictures, and the paper's figures beside them."""
