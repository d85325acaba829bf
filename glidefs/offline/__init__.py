"""TODO glidefs/offline"""
