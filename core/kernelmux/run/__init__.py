"""Doing it: a plan bound, walked and captured; sessions, sampling, text."""
