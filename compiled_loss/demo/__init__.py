"""The demo, `compiled-loss demo`: a transformer trained on real text, twice from one seed, to compare two losses.

settings  the options of a run, and their defaults   child     child processes that report events
text      tokens of the standard library             progress  bars on a terminal, lines elsewhere
model     the transformer                            report    the measurements, and their table
train     the training loop, one loss per child      picture   the same as a PNG
session   all of it in order
"""
