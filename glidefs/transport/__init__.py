"""How guests reach a volume: one package per transport, ``base`` chooses between them.

Used by ``exports``. A transport knows the core's handle of a volume, and neither exports nor the store.
"""
