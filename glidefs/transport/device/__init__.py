"""TODO glidefs/transport/device"""
