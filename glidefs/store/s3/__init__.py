"""TODO glidefs/store/s3"""
