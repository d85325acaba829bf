"""Base images as others use them: their manifests and hot sets, memoized by name.

``manifest_cache`` has the shared frozen manifests, asks the store and keeps an outage away from forks;
``stored`` is a base in the store; ``profile`` records a boot. Used by ``bless`` and what is above. Knows no
volume that is served.
"""
