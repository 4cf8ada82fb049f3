"""``resu-compile demo``: dense, pruned and resurrected models of two real tasks, side by side."""
