"""Model families, one file each; use :func:`medgmae.create_model` to build one by name."""
