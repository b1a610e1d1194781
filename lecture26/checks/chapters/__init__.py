"""The exercises of the chapters: a module for each, with a list EXERCISES."""
