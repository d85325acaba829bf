"""Makes the helpers that lie beside it importable by every test: pytest puts its directory on the path."""
