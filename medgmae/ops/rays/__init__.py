"""Line integrals of volumes, with their adjoint."""
