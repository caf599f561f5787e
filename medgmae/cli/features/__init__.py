"""``medgmae features``: scans on disk to files of features, in this process, in several, or on a cluster."""

from medgmae.cli.features.command import features_command

__all__ = ["features_command"]
