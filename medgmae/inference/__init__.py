"""A model on whole scans: features, latent maps, reconstructions."""
