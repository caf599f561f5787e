"""3D Gaussians projected along rays onto detectors, with gradients."""
