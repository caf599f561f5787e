"""One file per dialect of checkpoints; recognise.py finds the one that fits."""
