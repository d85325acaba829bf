"""Ways to break the volume layer and the formats, for mutations.py."""

from __future__ import annotations

from mutation import Mutation

ROOTS = "tests/volume/test_roots.py::"
OWNERSHIP = "tests/volume/test_volume_ownership.py::"
UPLOAD = "tests/volume/test_volume_upload.py::"
RESIZE = "tests/volume/test_volume_resize.py::"
COMPACTION = "tests/volume/test_volume_compaction.py::"
DEMOTE = "tests/volume/test_volume_demote.py::"

VOLUME = [
    # -- section 4, retire: what a segment leaves in the block cache
    Mutation(
        "demoted-though-written-since",
        "csrc/carry/demote.c",
        "        if (pos_seq(pos) > d->committed)",
        "        if (false && pos_seq(pos) > d->committed)",
        (DEMOTE + "test_what_was_written_since_is_not_put_there",),
    ),
    Mutation(
        "demoted-from-a-base-that-is-newer",
        "csrc/carry/demote.c",
        "    return here;",
        "    return true;",
        (DEMOTE + "test_a_base_that_is_newer_than_the_plan",),
    ),
    # -- section 4, identity and fencing: the volume layer
    Mutation(
        "attach-keeps-the-log-id",
        "glidefs/manifest/lease.py",
        "            log_id=new_id(),\n            last_segment=0,\n            epoch=root.epoch + 1,",
        "            log_id=root.log_id,\n            last_segment=0,\n            epoch=root.epoch + 1,",
        (OWNERSHIP + "test_attach_refuses_and_takes_over",),
    ),
    Mutation(
        "attach-does-not-commit",
        "glidefs/manifest/lease.py",
        "result = commit_root(store, manifest_key(prefix, name), mine, etag, base=root)",
        "result = CommitResult(etag, None)",
        (OWNERSHIP + "test_attach_refuses_and_takes_over",),
    ),
    Mutation(
        "log-that-the-root-does-not-name-is-opened",
        "glidefs/host/host.py",
        "        if not record.read_only and root.log_id != record.log_id:",
        "        if False:",
        (OWNERSHIP + "test_a_log_that_the_root_does_not_name_is_not_opened",),
    ),
    Mutation(
        "refused-put-of-our-own-fences",
        "glidefs/manifest/lease.py",
        "    if not missed and ours is not None:\n",
        "    if ours is not None:\n",
        (OWNERSHIP + "test_a_root_of_our_log_that_we_do_not_know_is_adopted_whole",),
    ),
    Mutation(
        "lost-answer-is-not-found-to-be-ours",
        "glidefs/manifest/lease.py",
        "    if new is not None and root.nonce == new.nonce:\n        return CommitResult(found.etag, None)",
        '    if new is not None and root.nonce == new.nonce:\n        raise Fenced(key, "not ours")',
        (OWNERSHIP + "test_the_lost_answer_of_a_commit_is_our_own",),
    ),
    Mutation(
        "foreign-root-is-adopted",
        "glidefs/manifest/lease.py",
        "        raise judge(key, root, ours)\n",
        "        pass\n",
        (OWNERSHIP + "test_a_foreign_root_fences",),
    ),
    Mutation(
        "root-that-is-gone-is-put-again",
        "glidefs/manifest/lease.py",
        "            found = resolve(store, key, new, base, tried)\n",
        "            try:\n"
        "                found = resolve(store, key, new, base, tried)\n"
        "            except Fenced:\n"
        "                etag = None\n"
        "                continue\n",
        (OWNERSHIP + "test_a_root_that_is_gone_fences",),
    ),
    Mutation(
        "removed-elsewhere-and-put-again",
        "glidefs/manifest/lease.py",
        "            if there.volume_id == root.volume_id:",
        "            if False:",
        (ROOTS + "test_what_was_taken_over_and_removed_is_not_put_again",),
    ),
    Mutation(
        "doomed-name-is-taken",
        "glidefs/manifest/lease.py",
        "            if there.doomed and",
        "            if False and",
        (ROOTS + "test_nobody_takes_a_name_that_is_being_removed",),
    ),
    Mutation(
        "roots-are-put-without-a-condition",
        "glidefs/manifest/lease.py",
        "            return CommitResult(store.put(key, data, if_match=etag), None)",
        "            return CommitResult(store.put(key, data), None)",
        (OWNERSHIP + "test_a_foreign_root_fences",),
    ),
    Mutation(
        "conditional-puts-are-retried-below-us",
        "glidefs/store/s3/client.py",
        '"retries": {"total_max_attempts": 1,',
        '"retries": {"total_max_attempts": 4,',
        ("tests/store/test_s3.py::test_puts_are_not_retried_by_the_client",),
    ),
    Mutation(
        "root-is-not-polled",
        "glidefs/writing/scheduler.py",
        "                    self._uploader.poll(volume)",
        "                    pass",
        (OWNERSHIP + "test_a_stale_owner_learns_of_its_fence_without_committing",),
    ),
    # -- sections 4 and 6: order of upload, local copy and retire
    Mutation(
        "uploaded-before-it-is-synced",
        "glidefs/writing/upload.py",
        "                volume.core.sync()\n",
        "                pass\n",
        (UPLOAD + "test_segments_are_synced_before_they_are_uploaded",),
    ),
    Mutation(
        "retired-without-a-local-copy",
        "glidefs/manifest/commit.py",
        "            self.copy_lags = True\n            return\n",
        "            self.copy_lags = True\n",
        (OWNERSHIP + "test_local_copy_is_durable_before_a_segment_may_go",),
    ),
    Mutation(
        "log-opened-before-the-local-copy",
        "glidefs/host/host.py",
        "must be durable here first.\n            volume.committer.save_local(copy)\n",
        "must be durable here first.\n            pass\n",
        (OWNERSHIP + "test_the_local_copy_is_there_before_the_log_is_opened",),
    ),
    Mutation(
        "size-committed-before-its-zeroes",
        "glidefs/writing/scheduler.py",
        "committed = size if whole else max(size, volume.root.size)",
        "committed = size",
        ("tests/model/test_volume_shrink.py",),
    ),
    Mutation(
        "blocks-behind-the-end-count-as-the-old-chunk",
        "csrc/upload/plan.c",
        "        c->whole += within && (within & ~(e->mask | e->zero_mask)) == 0;",
        "        c->whole += (within & ~(e->mask | e->zero_mask)) == 0;",
        (RESIZE + "test_what_a_grow_brought_does_not_count_as_the_old_chunk[False]",),
    ),
    Mutation(
        "extents-behind-the-end-count-as-the-old-chunk",
        "glidefs/writing/upload.py",
        "        end = min(extent.block + extent.count, blocks_end)",
        "        end = extent.block + extent.count",
        (RESIZE + "test_what_a_grow_brought_does_not_count_as_the_old_chunk[True]",),
    ),
    # -- section 6: ids and grace
    Mutation(
        "ids-without-the-nonce",
        "glidefs/formats/pack.py",
        "blake3(index_hash + volume_id + nonce)",
        "blake3(index_hash + volume_id)",
        ("tests/formats/test_pack.py::test_ids_are_never_reused",),
    ),
    Mutation(
        "upload-older-than-half-the-grace-is-committed",
        "glidefs/writing/upload.py",
        "        if clock.elapsed() - started > self._settings.gc_grace / 2:\n            # The",
        "        if False:\n            # The",
        (UPLOAD + "test_packs_that_took_too_long_are_made_anew",),
    ),
    # -- section 6: compaction
    Mutation(
        "merge-result-goes-on-top",
        "glidefs/manifest/commit.py",
        "            chunks[replace.chunk] = refs[:at] + replace.new + refs[at + len(replace.old) :]",
        "            chunks[replace.chunk] = refs[:at] + refs[at + len(replace.old) :] + replace.new",
        (COMPACTION + "test_packs_appended_while_a_merge_runs_stay_newer",),
    ),
    Mutation(
        "merge-result-without-its-run",
        "glidefs/manifest/commit.py",
        "        if at >= 0:\n",
        "        if True:\n",
        (COMPACTION + "test_a_run_that_was_dropped_meanwhile_stays_dropped",),
    ),
    Mutation(
        "zero-masks-dropped-above-the-bottom",
        "glidefs/compaction/plan.py",
        "        if run.bottom:\n",
        "        if True:\n",
        (COMPACTION + "test_zero_masks_go_only_at_the_bottom",),
    ),
    Mutation(
        "a-copy-of-a-host-removes-by-the-log",
        "glidefs/manifest/lease.py",
        "found.log_id != mine.log_id or not ours(found)",
        "found.log_id != mine.log_id",
        (
            "tests/forks/test_cloned_hosts.py::test_a_copy_of_a_host_that_could_not_open_the_volume_does_not_remove_it",
        ),
    ),
    Mutation(
        "a-copy-of-a-host-goes-on-with-the-log",
        "glidefs/exports/opener.py",
        "        if self.logs.put_here(root) is False:",
        "        if False:",
        (
            "tests/forks/test_cloned_hosts.py::test_a_copy_of_a_host_without_a_record_has_no_part_in_the_volume",
        ),
    ),
    Mutation(
        "every-error-asks-which-store-it-is",
        "glidefs/store/which.py",
        "                if wait <= 0:",
        "                if True:",
        ("tests/store/test_which.py::test_a_storm_asks_once_in_a_while",),
    ),
    Mutation(
        "throttling-asks-which-store-it-is",
        "glidefs/store/which.py",
        "        if not isinstance(error, Throttled):",
        "        if True:",
        ("tests/store/test_which.py::test_throttling_is_no_reason_to_ask_which_store_it_is",),
    ),
    # -- section 5: keys
    Mutation(
        "merged-blocks-share-the-name-space-of-whole-ones",
        "glidefs/manifest/keys.py",
        "    hasher = blake3(derive_key_context=_MERGED)\n",
        "    hasher = blake3()\n",
        ("tests/volume/test_volume_reader.py::test_merged_keys_have_a_name_space_of_their_own",),
    ),
    Mutation(
        "merged-key-without-the-masks",
        "glidefs/manifest/keys.py",
        "hasher.update(_PART.pack(part.hash, part.mask, part.zero_mask))",
        "hasher.update(part.hash)",
        ("tests/volume/test_volume_reader.py::test_merged_keys_depend_on_order_and_masks",),
    ),
]
