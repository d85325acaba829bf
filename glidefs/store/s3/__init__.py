"""Objects in S3: reads over pooled raw connections with signed URLs, the rest through boto3."""
