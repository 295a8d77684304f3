"""Speed, measured: single kernels against the machine's ceilings, and whole steps of a model.

Enters: shapes, or a model and a plan. Leaves: rows for a table, and the document that docs/performance.py reads. Every
figure is a median beside its spread, taken past the caches that a real step would have overwritten.
"""
