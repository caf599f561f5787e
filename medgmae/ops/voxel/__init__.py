"""3D Gaussians rendered into volumes, with gradients."""
