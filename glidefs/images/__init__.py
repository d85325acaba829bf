"""Whole disk images: reading them out of a store."""
