"""Data turns shards into batches.

A data set is a folder of ordinary WebDataset tars. Beside each tar lies a sidecar index (`NAME.idx`), and
beside all of them `dataset.json`, which is written last: a folder that has it is complete.

The contract that every file here keeps:

1. The order is a pure function. `plan.py` maps a position of an endless stream to a sample, from nothing
   but (counts, seed, window). Nothing is drawn, nothing is remembered.
2. The state is one integer, the number of stream positions consumed. A run that saves it and starts there
   goes on at the very next sample, on any number of ranks, in no time.
3. Global batch b is positions [b G, (b + 1) G) of the stream, and rank r of R takes positions r, r + R, ...
   of it. So ranks never run out of samples at different times, and an epoch may end inside a batch.
4. A file is whole or absent. Everything is written to a temporary name, synced and renamed.
5. A mistake in the data names the shard and the key.

The files, in the order in which a sample travels:

    sources.py    chooses by the form of a source's name; a folder, digits, shards packed anew
    tables.py     one picture a row; rows.py: CSV, JSONL, parquet and `datasets` as rows
    tabular.py    a vector of numbers a row; number_files.py: files of them, density_sets.py: published sets
    emoji.py      emoji from npm packages, three drawings of each
    pictures.py   pictures of any kind become pictures of one kind
    split.py      a source in two parts, one of them held out
    making.py     a source becomes shards: by several processes, resumable
    synthetic.py  two-dimensional point sets with a known density, of shapes.py
    writer.py     one sample after another into tars; `write_atomically`
    index.py      the sidecar of one tar: where each member lies, and its checksum
    card.py       `dataset.json`: what a data set says of itself
    shards.py     a folder of indexed tars as one data set: `ShardSet`
    remote.py     reads behind an address (http://, s3://, ...), again where it fails
    cache.py      a bounded folder of whole files that the processes of a node share
    cached.py     the shards of a data set behind an address, through that cache
    prefetch.py   brings the shards that come next into the cache, in threads
    check.py      reads every byte of a data set and says what is wrong with it
    repair.py     writes indices and cards anew, from the tars
    encode.py     pictures to latents, captions to embeddings, once, on any number of processes (processes.py)
    drawn.py      samples drawn from a data set, for something to be made of their labels
    encoders.py   what is stored of each picture and caption
    text.py       where captions stand, and their embeddings as batches
    labels.py     what a sample is labelled by: class, a field of its json, caption
    buckets.py    the sizes that pictures have, each shard those of one
    joined.py     several data sets as one; routed.py: some of them behind addresses
    plan.py       which sample goes into which slot of which batch
    mixture.py    several plans as one, each with its weight
    order.py      the plan of a data set, or the mixture of data sets, classes or buckets
    reader.py     the bytes of one sample
    members.py    the bytes of one member as an array: picture, array, label
    decode.py     the members of a sample as pixels, moments of latents, or points
    samples.py    samples by their numbers as batches
    faults.py     what stands in the places of samples that cannot be used
    ahead.py      a thread that reads batches ahead
    batch.py      batches as tensors, in the exact order
    stream.py     shards without an index: folders, addresses, commands
    resampled.py  batches of these, drawn at random

Only what makes tensors imports torch: `decode.py` and what follows it, the encoders. Nothing here imports
models, trainer or launch.
"""
