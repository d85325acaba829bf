"""TODO glidefs/exports/copies"""
