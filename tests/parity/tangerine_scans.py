"""Adapters for TANGERINE's way from a file to a prediction."""
