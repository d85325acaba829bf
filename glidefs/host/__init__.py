"""TODO glidefs/host"""
