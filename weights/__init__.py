"""Weight cards: one JSON file per published checkpoint, read through `medgmae.weight_card` and `medgmae.list_weights`."""
