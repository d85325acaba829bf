"""Runs under the system's Python, where libnbd's bindings are: does a list of calls from stdin.

stdin: {"uri": ..., "connections": n, "calls": [{"on": 0, "call": "pread", ...}, ...]}
stdout: one result per call: {"data": hex} or {"errno": n} or {}.
"""

import json
import sys

import nbd


def perform(handle, call):
    kind, flags = call["call"], call.get("flags", 0)
    if kind == "pread":
        return {"data": handle.pread(call["length"], call["offset"], flags).hex()}
    if kind == "pwrite":
        handle.pwrite(bytes.fromhex(call["data"]) * call.get("repeat", 1), call["offset"], flags)
    elif kind in ("trim", "zero", "cache"):
        getattr(handle, kind)(call["length"], call["offset"], flags)
    elif kind == "flush":
        handle.flush(flags)
    elif kind == "facts":
        names = ("flush", "fua", "trim", "zero", "fast_zero", "multi_conn", "df", "cache")
        facts = {name: bool(getattr(handle, "can_" + name)()) for name in names}
        facts["read_only"] = bool(handle.is_read_only())
        facts["size"] = handle.get_size()
        facts["blocks"] = [handle.get_block_size(kind) for kind in range(3)]
        return facts
    elif kind == "shutdown":
        handle.shutdown()
    return {}


def main():
    asked = json.load(sys.stdin)
    handles = []
    for _ in range(asked["connections"]):
        handle = nbd.NBD()
        handle.set_strict_mode(0)
        handle.connect_uri(asked["uri"])
        handles.append(handle)
    results = []
    for call in asked["calls"]:
        try:
            results.append(perform(handles[call.get("on", 0)], call))
        except nbd.Error as error:
            results.append({"errno": error.errnum, "text": error.string})
    json.dump(results, sys.stdout)


main()
