"""3D Gaussians: rendering, frames, files, fitting."""
