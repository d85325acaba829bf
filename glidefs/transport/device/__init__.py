"""What all transports with a kernel block device share: names in /dev, tags, and who has one open."""
