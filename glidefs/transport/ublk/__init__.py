"""TODO glidefs/transport/ublk"""
