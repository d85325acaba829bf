"""Ways to break the product that the simulation finds, for tests/model/mutations.py."""

from __future__ import annotations

from mutations_core import Mutation

SEEDS = ("tests/sim/test_sim.py",)

SIM = [
    # -- gc
    Mutation(
        "gc-has-no-grace",
        "glidefs/gc.py",
        "return _Run(store, names.check_prefix(prefix), grace, limit,",
        "return _Run(store, names.check_prefix(prefix), 0.0, limit,",
        SEEDS,
    ),
    Mutation(
        "gc-deletes-at-first-sight",
        "glidefs/gc.py",
        "            for id_, since in kind.seen.items()\n",
        "            for id_, since in dict.fromkeys(kind.sizes, 0.0).items()\n",
        SEEDS,
    ),
    Mutation(
        "gc-waits-for-no-grace-between-sightings",
        "glidefs/gc.py",
        "            if since <= self._newest and id_ in kind.sizes",
        "            if id_ in kind.sizes",
        ("tests/gc/test_gc_rules.py",),
    ),
    Mutation(
        "gc-deletes-what-is-young",
        "glidefs/gc_mark.py",
        "            if info.last_modified > now - grace:\n",
        "            if False:\n",
        SEEDS,
    ),
    Mutation(
        "gc-counts-newborns-as-seen",
        "glidefs/gc_mark.py",
        "            if info.last_modified >= now - grace / 2:\n",
        "            if False:\n",
        SEEDS,
    ),
    Mutation(
        "gc-does-not-look-at-tags",
        "glidefs/gc_mark.py",
        "(names.volumes_prefix, names.bases_prefix, names.tags_prefix)",
        "(names.volumes_prefix, names.bases_prefix)",
        SEEDS,
    ),
    Mutation(
        "gc-does-not-look-again-before-it-deletes",
        "glidefs/gc.py",
        "            self._marker.look()\n",
        "",
        SEEDS,
    ),
    # -- what must last on the local disk
    Mutation(
        "small-files-are-not-synced",
        "glidefs/formats/atomic.py",
        "            write_all(fd, data)\n            os.fsync(fd)\n",
        "            write_all(fd, data)\n",
        SEEDS,
    ),
    Mutation(
        "directories-of-small-files-are-not-synced",
        "glidefs/formats/atomic.py",
        "    fsync_dir(target.parent)\n",
        "",
        SEEDS,
    ),
    Mutation(
        "local-copy-is-not-tried-again",
        "glidefs/volume/scheduler.py",
        "            volume.committer.save_again()\n",
        "",
        SEEDS,
    ),
    Mutation(
        "opened-without-a-local-copy",
        "glidefs/volume/commit.py",
        "                local.save(self._state_dir, self.root.volume_id, self.root, data, self.etag, {})\n",
        "                self._save(self.root, data, {})\n",
        SEEDS,
    ),
    Mutation(
        "store-is-not-asked-after-a-failed-sync",
        "glidefs/opener.py",
        "        if not logs.lost_syncs(log_dir):\n",
        "        if True:\n",
        SEEDS,
    ),
    # -- first and last puts of a root
    Mutation(
        "pages-are-named-and-not-put",
        "glidefs/volume/commit.py",
        "            store.put(page_key(self._prefix, new.hex()), data)\n",
        "",
        SEEDS,
    ),
    Mutation(
        "first-root-that-was-put-counts-as-late",
        "glidefs/volume/uploader.py",
        "        if late and not volume.committer.was_published(self._store):\n",
        "        if late:\n",
        SEEDS,
    ),
    Mutation(
        "tombstone-fences-a-fork",
        "glidefs/volume/commit.py",
        "lease.commit_first(store, self._key, self.root, data)",
        "lease.commit_root(store, self._key, data, None, self.root.log_id)",
        SEEDS,
    ),
    Mutation(
        "given-up-and-served-again",
        "glidefs/opener.py",
        "            given_up = self._given_up(entry.record)\n",
        "            given_up = False\n",
        SEEDS,
    ),
    Mutation(
        "detach-does-not-drain",
        "glidefs/leaving.py",
        "            entry.drain(PATIENCE)\n            root, etag",
        "            root, etag",
        SEEDS,
    ),
    Mutation(
        "snapshot-does-not-commit",
        "glidefs/lineage.py",
        "        volume.drain(timeout)\n",
        "        pass\n",
        SEEDS,
    ),
    Mutation(
        "owner-is-not-asked-for-before-a-copy",
        "glidefs/volume/commit.py",
        "                put(root)\n                self._poll(store)\n",
        "                put(root)\n",
        SEEDS,
    ),
    Mutation(
        "source-is-not-looked-at-after-its-pin",
        "glidefs/pins.py",
        "            if store.head(source.key(prefix)).etag == etag:\n                return root\n",
        "            return root\n",
        ("tests/gc/test_gc_pins.py",),
    ),
    Mutation(
        "gc-deletes-pins-at-once",
        "glidefs/gc.py",
        "if pin.last_modified <= self._newest]",
        "]",
        ("tests/gc/test_gc_pins.py",),
    ),
    Mutation(
        "record-of-a-fork-before-its-root",
        "glidefs/router.py",
        "        if root.source and not of_base and not view:\n",
        "        self._records.save(entry.record)\n        if root.source and not of_base and not view:\n",
        ("tests/forks/test_copies.py",),
    ),
    Mutation(
        "local-root-is-not-compared-after-a-start",
        "glidefs/volume/host.py",
        "            volume.committer.doubt()\n",
        "",
        ("tests/forks/test_trouble.py",),
    ),
    Mutation(
        "found-copy-is-not-synced",
        "glidefs/volume/commit.py",
        "                local.sync(self._state_dir, self.root.volume_id)\n",
        "                pass\n",
        ("tests/forks/test_trouble.py",),
    ),
    Mutation(
        "fence-of-an-unknown-volume-is-forgotten",
        "glidefs/opener.py",
        "        volume.on_fenced = lambda volume, why: self._published(entry)\n",
        "",
        ("tests/forks/test_trouble.py",),
    ),
]
