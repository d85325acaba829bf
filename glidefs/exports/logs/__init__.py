"""Logs and records that no served export has: closed, set aside, lost, or unknown to the configuration."""
