"""TODO glidefs/transport/nbd"""
