"""The stages of a run, each one a function whose finished work survives a crash. :mod:`tersor.pipeline` orders them."""
