"""`compiled-loss demo`: a transformer trained on real text, twice from one seed, to compare two losses.

settings  what to run, and its defaults         child     child processes that report events
text      tokens of the standard library        progress  bars on a terminal, lines elsewhere
model     the transformer                       report    what was measured, and its table
train     the training loop, one loss a child   picture   the same as a PNG
session   all of it in order
"""
