"""Folders of files that appear whole or not at all: what token stores, checkpoints and exported models have in common.

A store is a folder of data files and one manifest with their sizes and sha256. A writer fills a hidden folder beside
the store's name (`unfinished.UnfinishedFolder`), each large file through a `checksums.ChecksummedFile`; then
`folders.write_manifest` writes the manifest, last, and `publish` renames the folder. A reader refuses a folder without
a manifest, compares sizes when it opens the store, and checksums (`checksums.sha256_of`) in a full verification.
What the files mean, the manifest's fields and the wording of refusals belong to each store. No tokens, no logits here.
"""
