"""TODO glidefs/exports/logs"""
