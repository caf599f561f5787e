"""Weight cards, one JSON file per published checkpoint; `medgmae.list_weights` and `medgmae.weight_card` read them."""
