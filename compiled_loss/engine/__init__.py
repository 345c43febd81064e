"""The chunk engine: the only autograd Functions, nested regions and custom operators of the library.

The engine knows row statistics, not losses. Arrows inside it point down only:

    flops                                how many operations our operators do
    token_loop, vocab_loop               two of them again, in loops of our own: not yet taken, see execution.LOOPS
    execution, operators                 how these run a body; what the compiler sees of them
    token_chunks, vocab_chunks, logits   the three ways to reach the statistics of [N, V] logits
    parts                                what each chunk gets of their tensors
    hosts                                how one body of elementwise mathematics is run
    bodies, gemm                         the mathematics of one chunk; GEMMs that write where they are told
    statistics, plan                     what the walks return; how long their chunks are
"""
