"""TODO glidefs/gc"""
