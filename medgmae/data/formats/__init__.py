"""File formats of scans, one file each."""
