"""TODO glidefs/daemon"""
