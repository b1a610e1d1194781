"""Graded homework: assignments built from the chapters, in nbgrader's formats.

`assignments` says what is graded and where it lies, and is all that a grader needs to import.
"""
