"""Copies of a manifest root that name the same packs: forks, snapshots, tags and bases. No data moves."""
