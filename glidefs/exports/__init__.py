"""The exports of this host: durable records, and the verbs on them.

``router`` has the verbs, ``table`` what exists, ``opener`` makes a record a served volume and back;
``logs`` is about logs that no served export has, ``copies`` about forks, snapshots, tags and bases made
here. Used by ``handoff``, ``api`` and ``daemon``. Knows no HTTP and no command line.
"""
