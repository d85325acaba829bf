"""One volume's life: faults served, log uploaded, packs compacted, ownership kept."""
