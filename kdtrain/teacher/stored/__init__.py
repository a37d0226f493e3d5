"""Records of a teacher that ran beforehand, on disk: sparse targets by key of the sequence.

`records` is what is known of one sequence, `codec` its bytes, `bits` the fields these consist of, `logit_store` the
folder. No model runs here and nothing communicates. Format and measurements: docs/design/0020-logit-store.md.
"""
