"""TODO glidefs/bases"""
