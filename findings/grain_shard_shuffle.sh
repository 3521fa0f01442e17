#!/usr/bin/env bash
# grain 0.2.12: IndexSampler(shuffle=True) on several shards never moves an example to another shard.
#
# Expected: every epoch is one order over the whole set, of which each process reads its share (what a global shuffle
# and torch's DistributedSampler do): over the epochs every process sees every example.
# Seen: records are cut into contiguous blocks first and shuffled within them: process 0 of 2 reads the same half in
# every epoch. Where a set lies sorted by class (folders of classes), each process, and so each device's part of the
# batch, has its own classes for the whole run; and the order of a run depends on the number of processes.
# `MapDataset.shuffle(seed)[process::count]` shuffles before it shards.
set -euo pipefail
unset PYTHONPATH
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check grain==0.2.12 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - 2>"$folder/log" <<'PY' || { tail -20 "$folder/log"; exit 1; }
import importlib.metadata

import grain.python as grain

print("grain", importlib.metadata.version("grain"))
records, epochs = 12, 4
print("examples 0 to 5 are of one class, 6 to 11 of another")


def loaded(process, processes):
    """The examples of one process, epoch by epoch."""
    shard = grain.ShardOptions(shard_index=process, shard_count=processes)
    sampler = grain.IndexSampler(records, shard_options=shard, shuffle=True, num_epochs=epochs, seed=0)
    rows = [int(x) for x in grain.DataLoader(data_source=range(records), sampler=sampler, worker_count=0)]
    each = len(rows) // epochs
    return [rows[i : i + each] for i in range(0, len(rows), each)]


for process in (0, 1):
    found = loaded(process, 2)
    print(f"IndexSampler, process {process} of 2:", found)
    block = set(range(6 * process, 6 * process + 6))
    assert all(set(epoch) == block for epoch in found) and len({tuple(epoch) for epoch in found}) > 1, "changed"
print("IndexSampler, one process:", loaded(0, 1))

mapped = grain.MapDataset.source(range(records)).shuffle(seed=0)
other = [[int(mapped[i]) for i in range(records * e, records * (e + 1), 2)] for e in range(epochs)]
print("MapDataset.shuffle(seed)[0::2], by epoch:", other)
assert len(set().union(*other)) > 6
print("holds: IndexSampler shuffles within contiguous shards only")
PY
