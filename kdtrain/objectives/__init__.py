"""Objectives of the student."""
