"""TODO glidefs/doctor"""
