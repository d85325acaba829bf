"""TODO glidefs/bless"""
