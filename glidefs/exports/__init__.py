"""TODO glidefs/exports"""
