"""Ways to break what is told of changes since a snapshot, for mutations.py; the rule: volume/changed.h."""

from __future__ import annotations

from mutation import Mutation

MODEL = "tests/model/test_changed_model.py"
CORE = "tests/core/test_core_changed.py::"
VOLUME = "tests/volume/test_volume_changed.py::"

CHANGED = [
    Mutation(
        "changed-without-the-log",
        "csrc/volume/io_changed.c",
        "return pos && pos_seq(pos) > w->last_segment;",
        "return !w && pos;",
        (MODEL, CORE + "test_the_log_on_top_of_a_window"),
    ),
    Mutation(
        "changed-without-zeros-of-the-log",
        "csrc/volume/io_changed.c",
        "        part.changed |= here && is_later(w, zeros.pos);\n",
        "",
        (MODEL, CORE + "test_the_log_on_top_of_a_window"),
    ),
    Mutation(
        "changed-runs-over-blocks-of-the-log",
        "csrc/volume/io_changed.c",
        "    part.end = min_u64(part.end, leaf * BLOCK_SECTORS);\n",
        "    (void)leaf;\n",
        (MODEL,),
    ),
    Mutation(
        "changed-counts-what-the-manifest-has",
        "csrc/volume/io_changed.c",
        "pos_seq(pos) > w->last_segment;",
        "pos_seq(pos) >= w->last_segment;",
        (CORE + "test_what_the_manifest_has_is_the_window_s_to_tell",),
    ),
    Mutation(
        "changed-windows-outlive-retire",
        "csrc/volume/io_changed.c",
        "w->last_segment >= v->forgotten_seq &&",
        "",
        (MODEL, CORE + "test_a_window_does_not_outlive_what_the_log_gives_back"),
    ),
    Mutation(
        "changed-retire-is-not-noted",
        "csrc/volume/retire.c",
        "    r->v->forgotten_seq = max_u64(r->v->forgotten_seq, r->seq);\n",
        "",
        (MODEL, CORE + "test_an_answer_that_comes_late_is_not_used"),
    ),
    Mutation(
        "changed-windows-are-kept-for-ever",
        "csrc/volume/io_changed.c",
        "elapsed_ns(now_ns(), w->born_ns) < KEPT_NS",
        "w->born_ns",
        (CORE + "test_a_deleted_snapshot_is_noticed_in_time",),
    ),
    Mutation(
        "changed-says-all-pages-are-equal",
        "glidefs/reading/changed.py",
        "    return ids[0] == ids[1]\n",
        "    return bool(ids[0]) == bool(ids[1])\n",
        (MODEL,),
    ),
    Mutation(
        "changed-looks-at-packs-of-now-alone",
        "glidefs/reading/changed.py",
        "    if len(pair.then) == shared:\n",
        "    if True:\n",
        (MODEL, VOLUME + "test_any_two_manifests"),
    ),
    Mutation(
        "changed-chunks-of-the-snapshot-are-left-out",
        "glidefs/reading/changed.py",
        "sorted(now.chunks.keys() | then.chunks.keys())",
        "sorted(now.chunks.keys())",
        (MODEL,),
    ),
    Mutation(
        "changed-zeros-are-left-out",
        "glidefs/reading/changed.py",
        "    same = ~(now.shown | then.shown)\n",
        "    same = ~(now.shown & then.shown)\n",
        (MODEL, VOLUME + "test_any_two_manifests"),
    ),
    Mutation(
        "changed-covered-sectors-show",
        "glidefs/reading/changed.py",
        "        show = mask & ~self.covered\n",
        "        show = mask\n",
        (VOLUME + "test_any_two_manifests",),
    ),
    Mutation(
        "changed-answers-say-of-an-older-manifest-that-it-is-newer",
        "glidefs/reading/changed.py",
        "    return Changed(first, end, changed, edges, now.root.last_segment)\n",
        "    return Changed(first, end, changed, edges, now.root.last_segment + 1)\n",
        (MODEL,),
    ),
    Mutation(
        "changed-of-an-earlier-volume-of-the-name",
        "glidefs/reading/changed.py",
        "    return found if found is not None and found.volume_id == origin.id else None\n",
        "    return found\n",
        (VOLUME + "test_snapshots_of_an_earlier_volume_of_the_name",),
    ),
    Mutation(
        "changed-contexts-lost-in-a-handoff",
        "csrc/transport/nbd/nbd_handoff.c",
        "        out.changed[i] = c->changed[i].snapshot;\n",
        "        out.changed[i] = i;\n",
        (CORE + "test_contexts_in_a_handoff",),
    ),
    Mutation(
        "extended-flush-forgets-the-offset",
        "csrc/transport/nbd/nbd_request.c",
        "    uint64_t offset = htobe64(r->offset),",
        "    uint64_t offset = htobe64(r->io.op == GLIDE_WRITE ? 0 : r->offset),",
        ("tests/core/test_core_sparse_handoff.py::test_a_logged_write_with_an_extended_header",),
    ),
]
