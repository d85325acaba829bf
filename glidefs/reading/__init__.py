"""TODO glidefs/reading"""
