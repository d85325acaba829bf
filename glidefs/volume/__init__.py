"""One volume's life: faults served, log uploaded, packs compacted, ownership kept."""

# Not of volumes alone; those who use it most know it from here.
from glidefs import heap as heap
