"""TODO glidefs/compaction"""
