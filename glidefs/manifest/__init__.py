"""TODO glidefs/manifest"""
