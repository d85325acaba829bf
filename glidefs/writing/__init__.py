"""TODO glidefs/writing"""
