"""Studies of the source papers, run again: a package for each, with the paper's figures beside ours."""
